"""Data in every form that users have, and what each mistake is told."""

from __future__ import annotations

import gc
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from paring.errors import InputError, UnsupportedError
from paring.samples import Samples, TensorSpec, open_samples, seeded

ONE = [TensorSpec("x", (1, 3), "float32")]
TWO = [TensorSpec("left", (-1, 3), "float32"), TensorSpec("right", (-1, 2), "int32")]
X = np.arange(12, dtype=np.float32).reshape(4, 3)
Z = np.arange(8, dtype=np.int32).reshape(4, 2)


def read(samples: Samples, name: str = "x") -> np.ndarray:
    return np.stack([sample[name] for sample in samples])


def message(*arguments, **keywords) -> str:
    """The one line that a user gets, from opening or from the first pass."""
    with pytest.raises(InputError) as caught:
        for _ in open_samples(*arguments, **keywords):
            pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Dataset:
    """Like tf.data.Dataset: iterable again and again, elements that NumPy converts, nothing known of its length."""

    def __init__(self, *items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def one_shot():
    yield from ((row, number) for number, row in enumerate(X))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_by_name_again_and_again(tmp_path, save):
    save(tmp_path / "d.npz", left=X, right=Z, labels=np.arange(4))
    samples = open_samples(str(tmp_path / "d.npz"), TWO)
    for _ in range(2):
        assert [{name: array.shape for name, array in sample.items()} for sample in samples] == [
            {"left": (1, 3), "right": (1, 2)}
        ] * 4
    np.testing.assert_array_equal(read(samples, "right")[:, 0], Z)
    assert samples.count == 4
    assert samples.labels.tolist() == [0, 1, 2, 3]


def test_stored_files_are_mapped_not_loaded(tmp_path, monkeypatch):
    np.savez(tmp_path / "d.npz", X, other=X.T)
    np.save(tmp_path / "d.npy", np.asfortranarray(X))
    from paring.samples.arrays import read_npy, read_npz

    arrays = read_npz(tmp_path / "d.npz")
    mapped = [*arrays.values(), read_npy(tmp_path / "d.npy")]
    assert all(isinstance(array, np.memmap) for array in mapped)
    np.testing.assert_array_equal(arrays["other"], X.T)
    np.testing.assert_array_equal(mapped[-1], X)


@pytest.mark.parametrize(
    "data",
    [
        X,
        {"x": X},
        {"any name serves an only input": X},
        (X, np.arange(4)),
        list(X),
        [X[:1], X[1:2], X[2:3], X[3:]],
        [X[:3], X[3:]],
        [{"x": row} for row in X],
        [(row,) for row in X],
        Dataset(*X),
        Dataset((X[:2], np.arange(2)), (X[2:], np.arange(2, 4))),
        one_shot,
        one_shot(),
        iter(X),
        lambda: X,
        lambda: (X, [0, 1, 2, 3]),
        lambda: Dataset(*X),
    ],
)
def test_every_python_form_gives_the_same_samples(data):
    samples = open_samples(data, ONE)
    for _ in range(3):
        np.testing.assert_array_equal(read(samples)[:, 0], X)
    assert samples.count == 4
    assert samples.labels is None or samples.labels.tolist() == [0, 1, 2, 3]


PAIRS = list(zip(X, Z, strict=True))


@pytest.mark.parametrize("items", [PAIRS, [{"left": x, "right": z} for x, z in PAIRS]])
@pytest.mark.parametrize("labelled", [False, True])
def test_items_with_several_inputs(items, labelled):
    samples = open_samples([(item, 7) for item in items] if labelled else items, TWO)
    np.testing.assert_array_equal(read(samples, "right")[:, 0], Z)
    assert samples.labels is None or samples.labels.tolist() == [7] * 4


def test_a_generator_is_consumed_once_and_replayed_from_disk():
    pulled = []

    def endless():
        while True:
            pulled.append(1)
            yield np.full((1, len(pulled), 2), len(pulled), np.float32), len(pulled)

    samples = open_samples(endless(), [TensorSpec("x", (1, -1, 2), "float32")], limit=5)
    first = [sample["x"] for sample, _ in zip(samples, range(2), strict=False)]
    again = [sample["x"] for sample in samples]
    assert [array.shape for array in again] == [(1, length, 2) for length in range(1, 6)]
    np.testing.assert_array_equal(first[1], again[1])
    assert len(pulled) == 5
    assert samples.labels.tolist() == [1, 2, 3, 4, 5]
    del samples
    gc.collect()  # the spool closes without a ResourceWarning


def test_a_failing_generator_fails_again_rather_than_ending_early():
    def broken():
        yield X[0]
        raise KeyError("pixel")

    samples = open_samples(broken(), ONE)
    for _ in range(2):
        with pytest.raises(InputError, match="the data source failed for broken: got KeyError") as caught:
            read(samples)
        assert isinstance(caught.value.__cause__, KeyError)


def test_a_function_that_cannot_start_again_is_found_out():
    items = iter(X)
    samples = open_samples(lambda: items, ONE)
    assert len(read(samples)) == 4
    with pytest.raises(InputError, match=r"changed between two passes.*expected 4 samples again, got 0"):
        list(samples)


@pytest.mark.parametrize(
    ("shape", "array", "count", "first"),
    [
        ((2, 3), X, 2, (2, 3)),
        ((-1, 3), X, 4, (1, 3)),
        ((2, 3), np.zeros((5, 2, 3)), 5, (2, 3)),
        ((-1,), np.zeros((3, 16)), 3, (16,)),
        ((1, -1, 3), np.zeros((4, 7, 3)), 4, (1, 7, 3)),
        ((), np.zeros(4), 4, ()),
    ],
)
def test_arrays_are_cut_into_the_models_batch(shape, array, count, first):
    samples = open_samples(array, [TensorSpec("x", shape, "float32")])
    assert samples.count == count
    assert {sample["x"].shape for sample in samples} == {first}


def test_a_tail_that_fills_no_batch_is_left_out_with_a_note():
    samples = open_samples({"x": X[:3], "labels": np.arange(3)}, [TensorSpec("x", (2, 3), "float32")])
    assert (samples.count, samples.labels.tolist()) == (1, [0, 1])
    assert samples.notes == ("input x: the last 1 of 3 rows do not fill a batch of 2 and are left out",)


def test_limit_cuts_samples_and_labels():
    for data in ({"x": X, "labels": np.arange(4)}, one_shot, one_shot()):
        samples = open_samples(data, ONE, limit=2)
        assert len(list(samples)) == 2
        assert samples.labels.tolist() == [0, 1]


def test_labels_from_a_file_win(tmp_path):
    np.save(tmp_path / "labels.npy", np.arange(4) + 10)
    for data in (X, {"x": X, "labels": np.arange(4)}, one_shot, list(X)):
        samples = open_samples(data, ONE, labels=str(tmp_path / "labels.npy"))
        assert samples.labels.tolist() == [10, 11, 12, 13]


def test_an_input_may_be_called_labels():
    samples = open_samples({"labels": X}, [TensorSpec("labels", (1, 3), "float32")])
    assert (samples.count, samples.labels) == (4, None)


def test_one_file_holds_several_signatures(tmp_path):
    np.savez(tmp_path / "d.npz", **{"encode/x": X, "encode/labels": np.arange(4), "decode/z": Z[:2]})
    encode = open_samples(tmp_path / "d.npz", ONE, signature_name="encode")
    decode = open_samples(tmp_path / "d.npz", [TensorSpec("z", (1, 2), "int32")], signature_name="decode")
    assert (encode.count, encode.labels.tolist(), decode.count, decode.labels) == (4, [0, 1, 2, 3], 2, None)


def test_short_names_serve_exported_ones():
    spec = [TensorSpec("serving_default_a:0", (1, 3), "float32"), TensorSpec("serving_default_b:0", (1, 2), "int32")]
    (first, *_) = open_samples({"a": X, "b": Z}, spec)
    assert list(first) == ["serving_default_a:0", "serving_default_b:0"]


@pytest.mark.parametrize(
    ("dtype", "given"),
    [
        ("float32", np.uint8),
        ("float32", np.float64),
        ("float32", ">f4"),
        ("float16", np.float32),
        ("int32", np.int64),
        ("int64", np.uint8),
        ("int8", np.int64),
        ("uint8", np.uint8),
        ("bool", np.bool_),
    ],
)
def test_values_are_cast_as_they_are(dtype, given):
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(given)
    got = read(open_samples(array, [TensorSpec("x", (1, 3), dtype)]))
    assert got.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(got[:, 0].astype(int), array.astype(int))


@pytest.mark.parametrize(
    ("dtype", "array", "words"),
    [
        ("int32", X, ["wrong dtype", "input x", "expected int32, got float32", "x.astype('int32')"]),
        ("int8", X, ["expected int8, got float32", "quantized", "scale"]),
        ("int8", X.astype(np.uint8), ["expected int8, got uint8", "- 128"]),
        ("uint8", X, ["expected uint8, got float32", "quantized"]),
        ("bool", Z.repeat(2)[:12].reshape(4, 3), ["expected bool, got int32"]),
        ("float32", X.astype(complex), ["expected float32, got complex128"]),
        (
            "int8",
            X.astype(np.int32) * 100,
            ["values out of range", "sample 0", "int8 values in [-128, 127]", "0 to 200"],
        ),
        ("float32", np.where(X == 7, np.nan, X), ["bad values", "sample 2", "finite", "1 NaN or infinite of 3"]),
        ("float16", X * 1e6, ["bad values", "sample 0", "finite"]),
    ],
)
@pytest.mark.parametrize("form", [np.asarray, list])
def test_wrong_values_are_refused_with_the_remedy(dtype, array, words, form):
    text = message(form(array), [TensorSpec("x", (1, 3), dtype)])
    for word in words:
        assert (word.replace("sample ", "item ") if form is list else word) in text


@pytest.mark.parametrize(
    ("data", "signature", "words"),
    [
        (X[:, :2], ONE, ["wrong shape", "expected [N, 3] with N samples, got [4, 2]"]),
        (X.ravel(), ONE, ["expected [N, 3] with N samples, got [12]", "x.reshape(-1, 3)"]),
        ([X[:, :2]], ONE, ["wrong shape", "item 0, input x", "expected [1, 3], got [4, 2]"]),
        ([X], [TensorSpec("x", (3, 3), "float32")], ["expected [3, 3], got [4, 3]"]),
        ({"left": X, "rihgt": Z}, TWO, ["wrong input name", "expected left, right, got rihgt. Did you mean right?"]),
        ({"left": X}, TWO, ["inputs are missing", "Add right"]),
        (X, TWO, ["one array for each of left, right"]),
        ([X], TWO, ["a dict or tuple of left, right"]),
        ([(X, Z, Z)], TWO, ["expected 2 inputs (left, right), or (inputs, label), got a tuple of 3"]),
        ({"left": X, "right": Z[:3]}, TWO, ["inputs differ in number", "left: 4, right: 3"]),
        ({"x": X, "labels": np.arange(3)}, ONE, ["labels do not match", "expected 4 labels, got 3"]),
        ([(X, np.arange(3))], ONE, ["labels do not match", "4 labels for 4 rows"]),
        ([(X[0], 1), X[1]], ONE, ["labels do not match", "expected 2 labels, got 1"]),
        (X[:0], ONE, ["has no samples"]),
        ([], ONE, ["has no samples"]),
        (iter([]), ONE, ["has no samples", "consumed before"]),
        (lambda: iter([]), ONE, ["has no samples"]),
        ({}, ONE, ["has no samples"]),
        (X[:1], [TensorSpec("x", (2, 3), "float32")], ["has no samples", "1 rows for a batch of 2"]),
        (np.array([[1], None], object), ONE, ["not an array of numbers", "dtype object"]),
        ([[[1, 2, 3], [4]]], ONE, ["not an array", "item 0"]),
        (7, ONE, ["arrays or an iterable, got int"]),
        ((X, X, X), ONE, ["(arrays, labels)", "a dict of arrays by name"]),
    ],
)
def test_what_does_not_fit_is_said(data, signature, words):
    text = message(data, signature)
    for word in words:
        assert word in text


def test_labels_given_apart_must_match_a_stream():
    assert "expected 4 labels, got 3" in message(one_shot, ONE, labels=[1, 2, 3])
    assert "expected 4 labels, got 9" in message(one_shot, ONE, labels=list(range(9)))
    assert open_samples(one_shot, ONE, labels=list(range(9)), limit=2).labels.tolist() == [0, 1]


def test_bad_files_are_said(tmp_path):
    np.save(tmp_path / "pickled.npy", np.array([[1], None], object), allow_pickle=True)
    np.savez(tmp_path / "pickled.npz", x=np.array([[1], None], object))
    np.savez(tmp_path / "data.npz", x=X)
    np.save(tmp_path / "short.npy", X)
    whole = (tmp_path / "short.npy").read_bytes()
    (tmp_path / "short.npy").write_bytes(whole[:-4])
    (tmp_path / "liar.npy").write_bytes(whole.replace(b"(4, 3)", b"(9, 9)"))
    (tmp_path / "junk.npy").write_bytes(b"hello")
    (tmp_path / "junk.npz").write_bytes(b"hello")
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "data.csv").write_text("1,2,3")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("readme.txt", "hi")
    wanted = {
        "pickled.npy": "pickled Python objects, which are never loaded",
        "pickled.npz": "pickled Python objects, which are never loaded",
        "short.npy": "expected a whole file, got 44 bytes for float32[4, 3]",
        "liar.npy": "expected a whole file, got 48 bytes for float32[9, 9]",
        "junk.npy": "expected .npy data",
        "empty.npy": "expected .npy data",
        "junk.npz": "a .npz archive",
        "other.npz": "arrays only",
        "data.csv": "got a .csv file",
        "dta.npz": "Did you mean data.npz?",
        "absent/data.npz": "no such data",
    }
    for name, words in wanted.items():
        assert words in message(tmp_path / name, ONE), name
    packed = (tmp_path / "data.npz").read_bytes()
    for cut in range(0, len(packed), 7):  # every truncation is one clear error, or harmless
        (tmp_path / "cut.npz").write_bytes(packed[:cut])
        message(tmp_path / "cut.npz", ONE)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A working folder with a module of the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "feed_mine.py").write_text(
        "import numpy as np\n"
        "def rows():\n    yield from ((np.full(3, i, 'float32'), i) for i in range(4))\n"
        "def whole():\n    return {'x': np.ones((5, 3))}, np.zeros(5)\n"
        "def fails():\n    yield np.zeros(3)\n    raise ValueError('disk gone')\n"
        "def dies():\n    raise RuntimeError('no licence')\n"
        "value = 3\n"
    )
    (tmp_path / "feed_broken.py").write_text("import feed_absent_helper\n")


def test_module_function(module):
    samples = open_samples("feed_mine:rows", ONE)
    assert samples.labels.tolist() == [0, 1, 2, 3]
    assert (len(list(samples)), samples.count) == (4, 4)
    assert open_samples("feed_mine:whole", ONE).count == 5


@pytest.mark.parametrize(
    ("text", "words", "cause"),
    [
        ("feed_mine:fails", ["the data source failed for feed_mine:fails", "ValueError: disk gone"], ValueError),
        ("feed_mine:dies", ["the data source failed", "RuntimeError: no licence"], RuntimeError),
        ("feed_mine:row", ["no such function", "Did you mean feed_mine:rows?"], type(None)),
        ("feed_mine:value", ["arrays or an iterable, got int"], type(None)),
        ("feed_nowhere:rows", ["no such module for feed_nowhere:rows", "working folder"], ModuleNotFoundError),
        ("feed_broken:rows", ["the module cannot be imported", "feed_absent_helper"], ModuleNotFoundError),
    ],
)
def test_module_function_errors_keep_the_users_traceback(module, text, words, cause):
    with pytest.raises(InputError) as caught:
        list(open_samples(text, ONE))
    for word in words:
        assert word in str(caught.value)
    assert isinstance(caught.value.__cause__, cause)


def test_seeded_samples_are_the_same_each_time_and_inside_their_ranges():
    signature = [
        TensorSpec("a", (-1, 50), "float32"),
        TensorSpec("b", (2, 50), "int32"),
        TensorSpec("c", (50,), "uint8"),
        TensorSpec("d", (1, 50), "bool"),
        TensorSpec("e", (1, 50), "float32"),
        TensorSpec("f", (), "int64"),
    ]
    samples = seeded(signature, 3, {"e": (5, 6), "f": (7, 7)})
    first, again, other = list(samples), list(samples), list(seeded(signature, 2, seed=1))
    for spec in signature:
        assert {(sample[spec.name].dtype.name, sample[spec.name].shape) for sample in first} == {
            (spec.dtype, tuple(abs(dim) for dim in spec.shape))
        }
        np.testing.assert_array_equal(first[1][spec.name], again[1][spec.name])
    low_high = {name: (float(np.min(array)), float(np.max(array))) for name, array in first[0].items()}
    assert -1 <= low_high["a"][0] < 0 < low_high["a"][1] <= 1
    assert low_high["b"] == low_high["d"] == (0, 1)
    assert low_high["c"][1] > 128
    assert 5 <= low_high["e"][0] < low_high["e"][1] <= 6
    assert low_high["f"] == (7, 7)
    assert not np.array_equal(first[0]["a"], other[0]["a"])
    assert samples.count == 3
    with pytest.raises(InputError, match=r"wrong input name for ranges: expected a, .*got z"):
        seeded(signature, 1, {"z": (0, 1)})


def image_folder(folder: Path, *names: str) -> Path:
    image = pytest.importorskip("PIL.Image")
    for shade, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (6, 4), (shade, 100, 255)).save(folder / name)
    return folder


IMAGE = [TensorSpec("image", (1, 4, 6, 3), "float32")]


def test_images_are_labelled_by_class_folder(tmp_path):
    image_folder(tmp_path, "cat/b.png", "cat/a.png", "dog/a.png")
    (tmp_path / "cat" / "notes.txt").write_text("passed over")
    samples = open_samples(tmp_path, IMAGE, image_range="0,255")
    assert samples.labels.tolist() == [0, 0, 1]
    assert read(samples, "image")[:, 0, 0, 0].tolist() == [[1, 100, 255], [0, 100, 255], [2, 100, 255]]
    numbered = image_folder(tmp_path / "n", "10/a.png", "9/a.png", "2/a.png")
    assert open_samples(numbered, IMAGE, image_range=(0, 1)).labels.tolist() == [2, 9, 10]


@pytest.mark.parametrize(
    ("dtype", "shape", "image_range", "wanted"),
    [
        ("float32", (1, 4, 6, 3), "-1,1", [-1, 100 / 127.5 - 1, 1]),
        ("float32", (-1, 3, 8, 8), "0,1", [0, 100 / 255, 1]),
        ("uint8", (1, 8, 8, 3), None, [0, 100, 255]),
        ("int8", (1, 8, 8, 3), None, [-128, -28, 127]),
        ("int32", (1, 8, 8, 3), None, [0, 100, 255]),
        ("uint8", (1, 4, 6, 1), None, [88]),
    ],
)
def test_images_take_the_inputs_size_layout_and_range(tmp_path, dtype, shape, image_range, wanted):
    image_folder(tmp_path, "a.png")
    samples = open_samples(tmp_path, [TensorSpec("image", shape, dtype)], image_range=image_range)
    (got,) = (sample["image"] for sample in samples)
    assert (got.shape, got.dtype.name) == (tuple(abs(dim) for dim in shape), dtype)
    pixel = got[0, :, 0, 0] if shape[1] == 3 else got[0, 0, 0]
    np.testing.assert_allclose(pixel, wanted, atol=1e-6)
    assert samples.labels is None


def test_images_that_do_not_fit_are_said(tmp_path, monkeypatch):
    image_folder(tmp_path, "good/a.png")
    assert "Give --image-range lo,hi" in message(tmp_path, IMAGE)
    assert "two numbers lo,hi" in message(tmp_path, IMAGE, image_range="1")
    assert "an image input" in message(tmp_path, ONE, image_range="0,1")
    assert "a model with one input, got 2 (left, right)" in message(tmp_path, TWO)
    assert "expected a folder of images" in message(X, ONE, image_range="0,1")
    (tmp_path / "good" / "b.png").write_bytes(b"not an image")
    assert "cannot read the image" in message(tmp_path, IMAGE, image_range="0,1")
    image_folder(tmp_path, "loose.png")
    assert "both (loose.png and good/a.png)" in message(tmp_path, IMAGE, image_range="0,1")
    (tmp_path / "none").mkdir()
    assert "has no samples" in message(tmp_path / "none", IMAGE, image_range="0,1")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(UnsupportedError, match=r'pip install "paring\[images\]"'):
        open_samples(tmp_path, IMAGE, image_range="0,1")
