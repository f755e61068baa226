"""Serves a SavedModel over HTTP, JSON in and out, as the REST interface of TensorFlow Serving does.

pip install fastapi uvicorn
python serve.py FOLDER --port 8501
curl localhost:8501/v1/models/model:predict -H 'Content-Type: application/json' -d '{"instances": [[1.0, 2.0]]}'
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import uvicorn
from fastapi import Body, FastAPI, Response
from fastapi.exceptions import RequestValidationError


def predict(signatures: Any, body: dict[str, Any]) -> dict[str, Any]:
    """Answers `{"instances": rows}` with `{"predictions": rows}`, `{"inputs": columns}` with `{"outputs": columns}`."""
    name = body.get("signature_name", "serving_default")
    if name not in signatures or ("instances" in body) == ("inputs" in body):
        raise ValueError(
            f"expected instances or inputs, and a signature_name of {sorted(signatures)}, got {sorted(body)}"
        )
    specs = signatures[name].structured_input_signature[1]
    given = body["instances"] if "instances" in body else body["inputs"]
    if "instances" in body and given and all(isinstance(row, dict) for row in given):
        given = {key: [row[key] for row in given] for key in given[0]}
    given = given if isinstance(given, dict) else dict.fromkeys(specs, given) if len(specs) == 1 else {}
    if given.keys() != specs.keys():
        raise ValueError(f"expected the inputs {sorted(specs)}, got {sorted(given)}")
    found = signatures[name](**{key: tf.constant(given[key], spec.dtype) for key, spec in specs.items()})
    arrays = {key: value.numpy() for key, value in sorted(found.items())}
    columns = {k: (np.char.decode(v.astype("S")) if v.dtype == object else v).tolist() for k, v in arrays.items()}
    if "inputs" in body:
        return {"outputs": columns if len(columns) > 1 else columns.popitem()[1]}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return {"predictions": rows if len(columns) > 1 else columns.popitem()[1]}


def serve(folder: Path, model_name: str) -> FastAPI:
    """The application; what a request does wrong is answered with code 400 and the reason."""
    if b"ImportParingTensorflow>" in (folder / "saved_model.pb").read_bytes():  # written with `--runtime native`
        import paring.tensorflow  # noqa: F401
    model, app = tf.saved_model.load(str(folder)), FastAPI()

    def refused(_: Any, error: Exception) -> Response:
        return Response(json.dumps({"error": str(error)}), 400, media_type="application/json")

    for kind in (RequestValidationError, TypeError, ValueError, KeyError, tf.errors.InvalidArgumentError):
        app.add_exception_handler(kind, refused)

    @app.post(f"/v1/models/{model_name}:predict")
    def _(body: dict[str, Any] = Body()) -> Response:  # noqa: B008
        return Response(json.dumps(predict(model.signatures, body)), media_type="application/json")

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", default="model")
    parser.add_argument("--port", type=int, default=8501)
    args = parser.parse_args()
    uvicorn.run(serve(args.folder, args.name), port=args.port)
