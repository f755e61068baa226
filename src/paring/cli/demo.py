"""`paring demo`: the whole story on a small real model, in under a minute."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import typer
from rich.table import Table

from paring.demo import load_digits, model_path
from paring.optimize import optimize
from paring.report import console, show_verification, size
from paring.runtime import Worker

RECIPES = ("dynamic-int8", "int8", "int4-int8")


KEEP = typer.Option(None, "--keep", help="Keep the model, its data and what was made of it in this folder.")


def demo(keep: Path | None = KEEP) -> None:
    """Quantize an embedded CNN (handwritten digits) and print size, accuracy and latency before and after."""
    out = console()
    calibration, images, labels = load_digits()
    with tempfile.TemporaryDirectory(prefix="paring-") as scratch:
        folder = keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model_path(), folder / "digits.tflite")
        np.savez_compressed(folder / "digits.npz", image=calibration)
        np.savez_compressed(folder / "digits-test.npz", image=images, labels=labels)
        models = {"float32 (before)": model_path()}
        out.print(f"A float32 CNN of {size(model_path().stat().st_size)}, {len(images)} held-out images of digits.\n")
        for recipe in RECIPES:
            path = folder / f"digits-{recipe}.tflite"
            result = optimize(model_path(), recipe, calibration, output=path, overwrite=True)
            out.print(
                f"[bold]{recipe}[/]: paring quantize digits.tflite -o {path.name} --recipe {recipe} --data digits.npz"
            )
            if result.report.verification is not None:
                show_verification(result.report.verification, out)
            models[recipe] = path
        table = Table(title="\nbefore and after", title_justify="left", pad_edge=False)
        for column in ("model", "size", "smaller", "accuracy", "latency", "ratio"):
            table.add_column(column, justify="left" if column == "model" else "right")
        with Worker(threads=1) as worker:
            for name, path in models.items():
                worker.load(name, path)
            taken = worker.time(list(models), [images[:1]])
            before = model_path().stat().st_size
            for name, path in models.items():
                right = [
                    int(worker.run(name, [image[None]])[0].argmax()) == y
                    for image, y in zip(images, labels, strict=True)
                ]
                after, spent = Path(path).stat().st_size, taken[name]
                table.add_row(
                    name, size(after), f"{before / after:.1f}x", f"{np.mean(right):.2%}",
                    f"{spent.median_ms * 1e3:.0f} +- {spent.spread_ms * 1e3 / 2:.0f} us", f"{spent.ratio:.2f}",
                )  # fmt: skip
        out.print(table)
        out.print("Latency: one thread, XNNPACK, models interleaved; ratio to float32. One image is 0.17 points.")


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("demo")(demo)
