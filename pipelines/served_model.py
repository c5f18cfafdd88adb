"""The exported model as MLflow loads it (a "model from code": this file and the exported folder, no pickle)."""

import io

import mlflow.models
import mlflow.pyfunc


class EmbeddingModel(mlflow.pyfunc.PythonModel):
    """A table with the columns `text` and `image` (the bytes of a file), either of which may be empty, to unit vectors."""

    def load_context(self, context) -> None:
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(context.artifacts["model"])

    def predict(self, context, model_input, params=None):
        return self.model.encode([as_message(row) for row in model_input.to_dict("records")])


def as_message(row: dict) -> list[dict]:
    """A row as sentence-transformers takes it with its order kept: one message, the image before its text."""
    from PIL import Image

    image, text = (row.get(column) for column in ("image", "text"))
    image = image if isinstance(image, bytes) else None  # pandas says None, NaN or NA for what is not there
    text = text if isinstance(text, str) else None
    parts = [{"type": "image", "image": Image.open(io.BytesIO(image))}] if image is not None else []
    parts += [{"type": "text", "text": text}] if text is not None else []
    if not parts:
        raise ValueError(f"a row has neither text nor image: {row}")
    return [{"role": "user", "content": parts}]


mlflow.models.set_model(EmbeddingModel())
