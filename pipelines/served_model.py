"""The exported model as MLflow loads it (a "model from code": this file and the exported folder, no pickle)."""

import mlflow.models
import mlflow.pyfunc


class EmbeddingModel(mlflow.pyfunc.PythonModel):
    """Texts to unit vectors. Images go through the folder itself, with sentence-transformers or pipelines/embed.py."""

    def load_context(self, context) -> None:
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(context.artifacts["model"])

    def predict(self, context, model_input: list[str], params=None):
        return self.model.encode(list(model_input)).tolist()


mlflow.models.set_model(EmbeddingModel())
