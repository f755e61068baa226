"""A LiteRT interpreter with paring's delegate."""

from __future__ import annotations

import os
from typing import Any

from paring.errors import InputError
from paring.runtime.native import delegate_path


def litert_interpreter(
    model: str | os.PathLike[str] | bytes,
    num_threads: int = 1,
    *,
    sparsity_threshold: float | None = None,
    isa: str | None = None,
    verbose: bool = False,
    **arguments: Any,
) -> Any:
    """An interpreter that runs layers with many zeros on paring's sparse kernels, and all else as ever.

    The delegate looks for zeros in the weights, and takes a layer where it expects to be faster. It is LiteRT's own way
    to extend an interpreter, and works without this function:

        from ai_edge_litert.interpreter import Interpreter, load_delegate  # or: from tensorflow.lite.experimental ...
        sparse = load_delegate(paring.delegate_path(), {"num_threads": 2})
        interpreter = Interpreter("model.tflite", num_threads=2, experimental_delegates=[sparse])

    Args:
      model: A `.tflite` file, or its bytes.
      num_threads: For the interpreter's own kernels and for ours, at least 1.
      sparsity_threshold: Share of zeros, 0 to 1, below which a layer is not looked at; None for the delegate's own.
      isa: Instruction set to use instead of the best: portable, avx2, avx2vnni, avx512 or avx512vnni.
      verbose: Says on the standard error stream, layer by layer, what was found, what is expected, and what was done.
      **arguments: More arguments of `ai_edge_litert.interpreter.Interpreter`.

    Returns:
      An `ai_edge_litert.interpreter.Interpreter`, not allocated yet.

    Raises:
      NativeError: paring was installed without its library.
      InputError: No such file, or bad options.
      ValueError: LiteRT cannot read the model.

    >>> from paring.demo import model_path
    >>> interpreter = litert_interpreter(model_path(), num_threads=2)
    >>> interpreter.allocate_tensors()
    >>> interpreter.get_output_details()[0]["shape"].tolist()
    [1, 10]
    """
    from ai_edge_litert.interpreter import Interpreter, load_delegate

    if num_threads < 1:
        raise InputError("cannot make an interpreter", expected="at least one thread", got=str(num_threads))
    options = {"num_threads": str(num_threads), "verbose": str(verbose).lower()}
    if sparsity_threshold is not None:
        options["sparsity_threshold"] = str(float(sparsity_threshold))
    if isa is not None:
        options["isa"] = isa
    if isinstance(model, bytes):
        arguments["model_content"] = model
    else:
        arguments["model_path"] = os.fspath(model)
        if not os.path.exists(model):
            raise InputError(
                "cannot make an interpreter", where=os.fspath(model), expected="a .tflite file", got="none"
            )
    path = delegate_path()
    try:
        delegate = load_delegate(path, options)
    except ValueError as error:
        raise InputError("cannot make the delegate", where=path, got=str(error)) from error
    delegates = [*(arguments.pop("experimental_delegates", None) or []), delegate]
    return Interpreter(num_threads=num_threads, experimental_delegates=delegates, **arguments)
