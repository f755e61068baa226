"""TensorFlow's own `quantize_saved_model`, the peer of SavedModels: in a child process, because it aborts on some.

python benchmarks/peer.py weight-only FOLDER OUTPUT
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

MODES = {
    "weight-only": "METHOD_STATIC_RANGE_WEIGHT_ONLY_INT8",
    "dynamic": "METHOD_DYNAMIC_RANGE_INT8",
}
PEERS = {mode: f"TensorFlow {mode} int8" for mode in MODES}
MEMORY = 16 << 30  # bytes of private memory: beyond it the machine would end some process, not this one


def quantize(mode: str, source: Path, target: Path, seconds: int) -> str | None:
    """Writes the peer's version of a SavedModel; gives the reason where there is none."""
    command = [sys.executable, __file__, mode, str(source), str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        shutil.rmtree(target, ignore_errors=True)
        return f"not finished in {seconds} s"
    if done.returncode == 0 and (target / "saved_model.pb").is_file():
        return None
    shutil.rmtree(target, ignore_errors=True)
    return why(done.returncode, done.stderr)


def why(code: int, said: str) -> str:
    """How a child ended and its last word that is one."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and not re.match(r"[IW]\d{4} |WARNING", line)]
    told = [line for line in lines if re.search(r"\w+Error\b|^F\d{4} |Check failed|Attempting to", line)]
    return f"{'aborts' if code < 0 else 'fails'} ({code}): {plain((told or lines or ['no word'])[-1])}"


def plain(said: str) -> str:
    """The beginning of a message without the folders of this machine."""
    return re.sub(r"(?<![\w<])/\S*/", "", " ".join(said.split()))[:200]


def _quantize(mode: str, source: str, target: str) -> None:
    """In the child."""
    import tensorflow as tf
    from tensorflow.compiler.mlir.quantization.tensorflow import quantization_options_pb2 as options
    from tensorflow.core.protobuf import saved_model_pb2

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    read = saved_model_pb2.SavedModel.FromString(Path(source, "saved_model.pb").read_bytes())
    keys = [key for key in read.meta_graphs[0].signature_def if not key.startswith("__")]
    chosen = options.QuantizationOptions(
        quantization_method=options.QuantizationMethod(preset_method=MODES[mode]),
        op_set="XLA",  # its default, and the only one for weights alone
        enable_per_channel_quantization=mode == "weight-only",  # refused for the other
        tags={"serve"},
        signature_keys=sorted(keys),
    )
    tf.quantization.experimental.quantize_saved_model(source, target, chosen, overwrite_output_directory=True)


if __name__ == "__main__":
    _quantize(*sys.argv[1:])
