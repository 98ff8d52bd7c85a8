"""Read and write a detector on disk: a folder of tensors, a graph and JSON, in which nothing can execute.

    cloth.bundle/
    ├── bundle.json          format, the record, SHA-256 of every other file
    ├── model.onnx           the network as a graph, to run without torch
    ├── weights.safetensors  everything fitted
    └── references.json, …   other files

It is written to a temporary folder and renamed, so that a bundle is complete or absent. Every file is compared with its
hash before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from normweave.errors import BundleError, MissingError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 2
RECORD = "bundle.json"
WEIGHTS = "weights.safetensors"
GRAPH = "model.onnx"
OPERATING_POINTS = ("calibration", "map_threshold", "unseen_map_threshold")
"""Keys of the record that `normweave calibrate` replaces."""
MAX_RECORD_BYTES = 64 * 2**20
"""The record is read into memory; with a hundred thousand calibration scores it has two million bytes."""

# A plain file name, which cannot leave the folder on any system.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def subclass_record(subclasses: Mapping[str, tuple[str, str | None]], names: Sequence[str]) -> dict[str, Any]:
    """Return the subclasses as the record holds them.

    Args:
        subclasses: category and subclass of each name, and of the training data.
        names: of those that images are routed to.
    """
    categories: dict[str, list[str]] = {}
    for category, subclass in sorted(subclasses.values(), key=str):
        categories.setdefault(category, [])
        if subclass is not None:
            categories[category].append(subclass)
    return {
        "categories": categories,
        "subclasses": {name: list(pair) for name, pair in subclasses.items()},
        "subclass_names": list(names),
    }


class _Listing(NamedTuple):
    """The parts of bundle.json."""

    record: dict[str, Any]
    files: dict[str, str]  # name -> SHA-256 in hex
    digest: str  # SHA-256 of bundle.json itself


def write(
    folder: Path,
    *,
    tensors: Mapping[str, NDArray[Any] | Tensor],
    record: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a bundle. With `overwrite` an existing bundle is replaced at the end.

    Args:
        tensors: everything fitted, written to weights.safetensors; the same tensors give the same bytes.
        record: settings, preparation, operating points, versions; JSON, without keys `format` and `files`.
        files: other files by name.

    Raises:
        BundleError: the folder exists, or something cannot be saved so that it can be read back.
    """
    contents = dict(files or {}) | {WEIGHTS: _tensor_bytes(tensors)}
    if wrong := [name for name in contents if not _NAME.fullmatch(name) or name == RECORD]:
        raise BundleError(f"A bundle cannot hold a file called {wrong[0]!r}; use letters, digits, '.', '-' and '_'.")
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(contents.items())}

    def fill(partial: Path) -> None:
        for name, content in contents.items():
            _write_synced(partial / name, content)

    _write(folder, record, hashes, fill, overwrite=overwrite)


def rewrite(source: Path, folder: Path, *, record: Mapping[str, Any], overwrite: bool = False) -> None:
    """Write a bundle again with another record; its other files are copied and compared with their hashes.

    Args:
        folder: the target; may be `source` itself.

    Raises:
        BundleError: as in `write` and in `read`.
    """
    hashes = _read_listing(source).files

    def fill(partial: Path) -> None:
        for name, expected in hashes.items():
            digest = hashlib.sha256()
            with _inside(source, name).open("rb") as old, (partial / name).open("xb") as new:
                while block := old.read(2**20):
                    digest.update(block)
                    new.write(block)
                new.flush()
                os.fsync(new.fileno())
            _compare(source, name, digest.hexdigest(), expected)

    _write(folder, record, hashes, fill, overwrite=overwrite)


def _write(
    folder: Path,
    record: Mapping[str, Any],
    hashes: Mapping[str, str],
    fill: Callable[[Path], None],
    *,
    overwrite: bool,
) -> None:
    """Write the record and the files of `fill` to a temporary folder, then rename it."""
    folder = Path(os.path.realpath(folder))
    check_target(folder, overwrite=overwrite)
    if taken := sorted({"format", "files"} & set(record)):
        raise BundleError(f"The record of a bundle may not have the keys {', '.join(taken)}: the bundle writes them.")
    try:
        text = json.dumps({"format": FORMAT, **record, "files": hashes}, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise BundleError(f"The record of a bundle must be JSON without NaN and infinity: {error}.") from error

    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process with the same id
    try:
        partial.mkdir(parents=True)
        fill(partial)
        _write_synced(partial / RECORD, text.encode())
        _sync_folder(partial)
        _replace(partial, folder)
    except OSError as error:
        raise BundleError(f"Cannot write the bundle {folder}: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(folder: Path, *, overwrite: bool) -> None:
    """Check that `write` may write here and can; call it before a long training.

    Raises:
        BundleError: the folder exists; even with `overwrite`, only a bundle is replaced. Or no folder can be made
            beside it.
    """
    folder = Path(folder)
    try:
        taken = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    except OSError as error:
        raise BundleError(f"Cannot read the folder {folder}: {error}.") from error
    if taken and not (folder / RECORD).is_file():
        raise BundleError(f"{folder} exists and is not a bundle, so it is not replaced. Choose another name.")
    if taken and not overwrite:
        raise BundleError(f"{folder} exists. Choose another name, or allow replacing it (--overwrite).")
    target = Path(os.path.realpath(folder))
    # As long as the longest name that `write` may need, so that the answer does not depend on the process id.
    trial, above = f"{target.name}.trial-{os.getpid():010}", target.parent
    try:
        while not above.exists():
            above = above.parent
        (above / trial).mkdir()
        (above / trial).rmdir()
    except OSError as error:
        raise BundleError(
            f"Cannot write the bundle {folder}: {error}. Choose another place, or correct its permissions."
        ) from error


def read(folder: Path) -> dict[str, Any]:
    """Return the record after comparing the hash of every listed file; other files are ignored.

    Raises:
        BundleError: not a bundle, of another format, damaged, or with a path outside its folder.
    """
    listing = _read_listing(folder)
    for name, expected in listing.files.items():
        digest = hashlib.sha256()
        try:
            with _inside(folder, name).open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
        except OSError as error:
            raise BundleError(f"{folder}: cannot read {name}: {error}. Copy the bundle again.") from error
        _compare(folder, name, digest.hexdigest(), expected)
    return listing.record


def read_tensors(folder: Path) -> dict[str, NDArray[Any]]:
    """Return all tensors by name. The parsed bytes are the bytes that were compared with the hash.

    Raises:
        BundleError: as in `read`, or a value is NaN or infinite.
        MissingError: safetensors is not installed.
    """
    name, content = WEIGHTS, read_file(folder, WEIGHTS)
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load
    except ImportError as error:
        raise _no_safetensors() from error
    try:
        tensors: dict[str, NDArray[Any]] = load(content)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{folder}: {name} is not a safetensors file: {error}. Train it again.") from error
    _check_finite(tensors, where=str(folder))
    return tensors


def read_file(folder: Path, name: str) -> bytes:
    """Return a file of the bundle; the bytes were compared with the hash.

    Raises:
        BundleError: as in `read`, or the bundle does not list it.
    """
    listing = _read_listing(folder)
    if name not in listing.files:
        raise BundleError(f"{folder} lists no {name}, so there is nothing to load. Train it again.")
    try:
        content = _inside(folder, name).read_bytes()
    except OSError as error:
        raise BundleError(f"{folder}: cannot read {name}: {error}. Copy the bundle again.") from error
    _compare(folder, name, hashlib.sha256(content).hexdigest(), listing.files[name])
    return content


def lists(folder: Path, name: str) -> bool:
    """Return whether the bundle has a file of this name."""
    return name in _read_listing(folder).files


def files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file beside bundle.json, by name."""
    return dict(_read_listing(folder).files)


def bundle_hash(folder: Path) -> str:
    """Return the SHA-256 of bundle.json, which lists the hashes of all other files."""
    return _read_listing(folder).digest


def weights_hash(folder: Path) -> str:
    """Return the SHA-256 of the weights: equal for two trainings with the same result, whatever their records."""
    return _read_listing(folder).files.get(WEIGHTS, "")


def _read_listing(folder: Path) -> _Listing:
    """Read and check bundle.json."""
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise BundleError(f"{folder} {what}; a bundle is a folder written by 'normweave train'.")
    path = folder / RECORD
    try:
        if not path.is_file():
            raise BundleError(f"{folder} holds no {RECORD}; a bundle is a folder written by 'normweave train'.")
        with path.open("rb") as file:
            content = file.read(MAX_RECORD_BYTES + 1)
    except OSError as error:
        raise BundleError(f"Cannot read {path}: {error}. Copy the bundle again.") from error
    if len(content) > MAX_RECORD_BYTES:
        raise BundleError(f"{path} has more than {MAX_RECORD_BYTES} bytes, so it is not a record of normweave.")
    try:
        record = json.loads(content.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is damaged: {error}. Copy the bundle again, or train it again.") from error
    if not isinstance(record, dict):
        raise BundleError(f"{path} must hold a JSON object, got {type(record).__name__}. Copy the bundle again.")

    version = record.pop("format", None)
    if type(version) is not int or version < 1:
        raise BundleError(f"{path} must contain its format, a whole number from 1, got {version!r:.60}.")
    if version < FORMAT:
        raise BundleError(
            f"{folder} is in format {version}, of normweave 0.1, and this normweave reads format {FORMAT}. "
            "Train it again with this version, or run it with normweave 0.1."
        )
    if version > FORMAT:
        raise BundleError(
            f"{folder} is in format {version}, and this normweave reads up to {FORMAT}. "
            "Upgrade with: pip install -U normweave"
        )
    files = record.pop("files", None)
    if not isinstance(files, dict):
        raise BundleError(f"{path} must list its `files` with their SHA-256, got {files!r:.60}. Copy the bundle again.")
    for name, digest in files.items():
        if not _NAME.fullmatch(name) or name == RECORD:
            raise BundleError(
                f"{path} lists a file {name!r:.60}, which is not a plain file name. Do not use this bundle."
            )
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise BundleError(f"{path} has no SHA-256 of {name}, got {digest!r:.80}. Copy the bundle again.")
    return _Listing(record=record, files=files, digest=hashlib.sha256(content).hexdigest())


def _inside(folder: Path, name: str) -> Path:
    """Return the path of a file, checked to be inside the folder."""
    path = Path(folder) / name
    real = Path(os.path.realpath(path))  # unlike Path.resolve it does not raise for circular links
    if real.parent != Path(os.path.realpath(folder)):
        raise BundleError(f"{folder}: {name} is a link to {real}, outside the bundle. Do not use this bundle.")
    if not path.is_file():
        raise BundleError(f"{folder}: {name} is missing. Copy the bundle again.")
    return path


def _compare(folder: Path, name: str, got: str, expected: str) -> None:
    if got != expected:
        raise BundleError(
            f"{folder}: {name} is not the file that was saved (SHA-256 {got[:12]}…, but {expected[:12]}… in "
            f"{RECORD}). Copy the bundle again, or train it again."
        )


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _tensor_bytes(tensors: Mapping[str, NDArray[Any] | Tensor]) -> bytes:
    try:
        from safetensors.numpy import save
    except ImportError as error:
        raise _no_safetensors() from error
    arrays = {}
    for name, value in tensors.items():
        array = value if isinstance(value, np.ndarray) else value.detach().cpu().numpy()
        arrays[name] = np.asarray(array, order="C")
    _check_finite(arrays, where="The detector to be saved")
    return bytes(save(arrays))  # which orders them itself


def _check_finite(tensors: Mapping[str, NDArray[Any]], *, where: str) -> None:
    for name, tensor in tensors.items():
        if np.issubdtype(tensor.dtype, np.inexact) and not np.isfinite(tensor).all():
            raise BundleError(f"{where}: tensor {name!r} holds NaN or infinity. Train it again.")


def _no_safetensors() -> MissingError:
    return MissingError('Weights are kept in safetensors, which is not installed: pip install "normweave[train]"')


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened, and a rename is synced by the system
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(partial: Path, folder: Path) -> None:
    """Rename the new bundle to its target; an old one is moved aside first, and back if that fails."""
    if not folder.exists():
        partial.rename(folder)
        _sync_folder(folder.parent)
        return
    aside = folder.with_name(f"{folder.name}.replaced-{os.getpid()}")
    folder.rename(aside)
    try:
        partial.rename(folder)
    except OSError:
        aside.rename(folder)
        raise
    _sync_folder(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)
