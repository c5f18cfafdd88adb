"""When things happen: the graph of steps, its recipes and the command that runs them."""
