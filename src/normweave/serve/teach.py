"""Teach a new product: a bundle with one subclass more, trained in a process of its own while the server inspects.

    teach/ID/
    ├── job.json       the state, written atomically
    ├── good/          images that the subclass is trained on
    ├── held_out/      every fifth image, which is scored with the new bundle
    ├── bundle/        the new bundle, renamed into place when it is complete
    └── maps/          anomaly maps of the held-out images

The commands are `normweave add-subclass` and `normweave predict`, at the lowest priority. The active bundle is not
changed. A server that ends meanwhile leaves at most this folder; its next start marks the job as interrupted.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import mimetypes
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from normweave.atomic import write_atomically
from normweave.data import images, rows
from normweave.errors import DataError, ImageError, MissingError, NormweaveError
from normweave.network.base import GraphNetwork
from normweave.serve.candidate import LOWEST_PRIORITY
from normweave.serve.library import ModelError
from normweave.serve.model_store import Actor
from normweave.serve.rendering import media_type

if TYPE_CHECKING:
    from normweave.serve.models import Models
    from normweave.serve.service import InspectionService, Upload

log = logging.getLogger(__name__)
FOLDER = "teach"
"""Inside the data folder of a server."""
FEWEST, MOST = 7, 60
"""Number of images of a new product. Every fifth is held out, and a subclass needs 5 to 50 images."""
HOLD_OUT = 5
NAME = re.compile(r"[^/\\\x00-\x1f\x7f]{1,60}")
"""A category or subclass; it is printable, too."""
NAMED = 5
"""Number of images that a message names."""
PROGRAM = (sys.executable, "-m", "normweave.supervised")
TeachState = Literal["training", "done", "failed", "interrupted", "kept"]
_UNREADABLE = 4  # exit code of commands that worked, but for some images


class TeachError(ModelError):
    """A product cannot be taught now, or a job does not allow this."""


class HeldOutImage(NamedTuple):
    """An image that the new subclass was not trained on; without values until it is scored."""

    name: str
    verdict: str | None = None
    score: float | None = None
    threshold: float | None = None
    subclass: str | None = None
    """That it was routed to."""


@dataclass(frozen=True, kw_only=True)
class TeachJob:
    """A training of a new product."""

    id: int
    category: str
    subclass: str
    actor: str
    """Name of the token of the engineer."""
    state: TeachState
    step: str
    """What is done now, for people."""
    started_at: datetime
    ended_at: datetime | None = None
    images: int
    """Number of images for training."""
    held_out: tuple[HeldOutImage, ...]
    base_hash: str
    """Of the bundle that the subclass is added to."""
    bundle_hash: str | None = None
    promise: str | None = None
    """What the false-alarm rate of the new product rests on."""
    in_shadow: bool = False
    """Whether the new bundle was offered as the candidate."""
    error: str | None = None
    """Why it failed, or why it is not in the shadow."""


class Teaching:
    """The one job of a server. Methods are thread-safe.

    Args:
        service: inspects with the bundle that a subclass is added to.
        program: the command line of normweave; also an attribute.
    """

    def __init__(self, service: InspectionService, *, program: Sequence[str] = PROGRAM) -> None:
        self._service, self.program = service, tuple(program)
        self.folder = service.folder / FOLDER
        self._lock = threading.RLock()
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._job = self._restore()

    @property
    def job(self) -> TeachJob | None:
        """The current or last job; None: there is none, or it was thrown away."""
        return self._job

    def missing(self) -> str | None:
        """Return why this machine cannot train; None: it can."""
        if importlib.util.find_spec("torch") is not None:
            return None
        return 'Training needs torch, which is not installed here. Install it with: pip install "normweave[train]"'

    def start(self, uploads: Sequence[Upload], *, category: str, subclass: str, actor: Actor) -> TeachJob:
        """Begin to train, and return the job.

        Raises:
            TeachError: another job is training or not decided (teach_busy); too few or too many images, one is not
                readable, or a name is not allowed (teach_input); they cannot be stored (teach_unwritable).
            MissingError: torch is not installed.
        """
        if (reason := self.missing()) is not None:
            raise MissingError(reason)
        for name, value in (("category", category), ("subclass", subclass)):
            if not NAME.fullmatch(value) or not value.isprintable() or value.strip(". ") != value:
                raise _wrong(
                    f"The {name} must have 1 to 60 printable characters without / and \\, and no dot or space at its "
                    f"ends, got {value!r:.80}."
                )
        by_hash = {hashlib.sha256(one.content).hexdigest(): one for one in uploads}
        different = list(by_hash.values())
        if not FEWEST <= len(different) <= MOST:
            raise _wrong(f"A new product needs {FEWEST} to {MOST} different good images, got {len(different)}.")
        for upload in different:
            try:
                images.decode(upload.content)
            except ImageError as error:
                raise _wrong(f"{upload.name}: {error}") from error
        base = self._service.detector
        seen = {*base.record["fit_hashes"], *base.record["calibration_hashes"]}
        if used := [one.name for text, one in by_hash.items() if text[: rows.HASH_LETTERS] in seen]:
            more = f" and {len(used) - NAMED} more" if len(used) > NAMED else ""
            raise _wrong(
                f"{', '.join(used[:NAMED])}{more} {'was' if len(used) == 1 else 'were'} used in training already. Give "
                "images that it has not seen (the same content counts as the same file)."
            )
        if (category, subclass) in base.subclasses.values():
            raise _wrong(f"The model knows {category}/{subclass} already. Give another name, or remove it first.")
        if not isinstance(base.network, GraphNetwork) or base.network.bundle is None:
            raise DataError("The active model is of no bundle, so no product can be added to it.")
        with self._lock:
            job = self._job
            if job is not None and job.state in ("training", "done"):
                wait = "Wait for its end" if job.state == "training" else "Keep it or throw it away first"
                raise TeachError(f"{job.category}/{job.subclass} is being taught. {wait}.", code="teach_busy")
            self._remove()
            held_out = different[::HOLD_OUT]
            job = TeachJob(
                id=time.time_ns() // 1_000_000,
                category=category,
                subclass=subclass,
                actor=actor.name,
                state="training",
                step="training",
                started_at=datetime.now(UTC),
                images=len(different) - len(held_out),
                held_out=tuple(HeldOutImage(one.name) for one in held_out),
                base_hash=base.bundle_hash or "",
            )
            folder = self._folder(job)
            try:
                _write_images(folder / "held_out", held_out)
                _write_images(folder / "good", [one for row, one in enumerate(different) if row % HOLD_OUT])
                self._save(job)
            except OSError as error:
                self._job = None
                self._remove()
                raise TeachError(
                    f"The images cannot be stored in {self.folder}: {error}. Free some space, or correct the "
                    "permissions of the folder.",
                    code="teach_unwritable",
                    status=503,
                ) from error
            detail = {"category": category, "subclass": subclass, "images": len(different), "base": job.base_hash}
            self._service.store.add_audit("teach_started", actor=actor.name, token=actor.token, detail=detail)
            self._thread = threading.Thread(target=self._train, args=[job, base.network.bundle], daemon=True)
            self._thread.start()
        return job

    def keep(self, id: int, actor: Actor) -> TeachJob:
        """Put the new bundle into the library, and offer it as the candidate in the shadow.

        Raises:
            TeachError: there is no such job (teach_unknown), it is not done (teach_state), or the server has no library
                (no_library), or one that cannot be written (library_unwritable).
        """
        with self._lock:
            job = self._checked(id, "done")
            models = self._service.models
            if models is None:
                raise TeachError(
                    "This server has no library of bundles, so the new one cannot be kept. Start it with --library.",
                    code="no_library",
                )
            name = "-".join(_slug(part) for part in (job.category, job.subclass, str(job.bundle_hash)[:12]))
            target = models.library.folder / name
            if not target.exists():
                unfinished = target.with_name(f"{name}.partial-{job.id}")
                shutil.rmtree(unfinished, ignore_errors=True)
                try:
                    shutil.copytree(self._folder(job) / "bundle", unfinished)
                    unfinished.rename(target)
                except OSError as error:
                    shutil.rmtree(unfinished, ignore_errors=True)
                    reason = error.args[0][0][-1] if isinstance(error, shutil.Error) else error  # of the first file
                    raise TeachError(
                        f"The new bundle cannot be copied into the library {models.library.folder}: {reason}. Correct "
                        "the permissions of the folder, or free some space. Then press Keep again.",
                        code="library_unwritable",
                        status=503,
                    ) from error
            failure = None
            try:
                self._start_shadow(models, job, actor)
            except NormweaveError as refusal:
                failure = f"It is in the library, but not in the shadow: {refusal}"
            job = replace(job, state="kept", in_shadow=failure is None, error=failure)
            self._save(job)
            self._audit("teach_kept", job, actor)
            return job

    def _start_shadow(self, models: Models, job: TeachJob, actor: Actor) -> None:
        """Offer the new bundle as the candidate, unless this would undo what was done meanwhile."""
        state = models.state()
        if state.active.bundle_hash != job.base_hash:
            raise ModelError(
                f"It was made from {state.name(job.base_hash)}, and now {state.name(state.active.bundle_hash)} "
                "inspects. Teach the product again, or start the bundle on the page Compare all the same.",
                code="base_changed",
            )
        if state.candidate not in (None, job.bundle_hash):
            raise ModelError(
                f"{state.name(str(state.candidate))} is there. Start the new bundle on the page Compare in its place.",
                code="shadow_taken",
            )
        models.start_shadow(str(job.bundle_hash), actor)

    def discard(self, id: int, actor: Actor) -> None:
        """Throw the job away; a training one is ended.

        Raises:
            TeachError: there is no such job (teach_unknown).
        """
        with self._lock:
            job = self._checked(id, *get_args(TeachState))
            self._job = None
            thread = self._thread
            if self._process is not None:
                self._process.kill()
            self._audit("teach_discarded", job, actor)
        if thread is not None:
            thread.join()
        with self._lock:
            if self._job is None:
                self._remove()

    def held_out_map(self, id: int, number: int) -> Path:
        """Return the PNG of a held-out image with its map.

        Raises:
            TeachError: there is no such job or image (teach_unknown).
        """
        job = self._checked(id, *get_args(TeachState))
        found = next(iter((self._folder(job) / "maps").glob(f"{number:06d}-*.png")), None)
        if found is None:
            raise TeachError(f"Job {id} has no map of image {number}.", code="teach_unknown", status=404)
        return found

    def stop(self) -> None:
        """End the training; the next start marks it as interrupted."""
        with self._lock:
            self._stopping = True
            if self._process is not None:
                self._process.kill()
        if self._thread is not None:
            self._thread.join()

    # ── the process ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _train(self, job: TeachJob, base: Path) -> None:
        folder = self._folder(job)
        try:
            named = ["--category", job.category, "--subclass", job.subclass]
            made = str(folder / "bundle")
            output = self._run(job, "add-subclass", str(base), str(folder / "good"), *named, "-o", made)
            found = json.loads(output.splitlines()[-1])
            with self._lock:
                if self._job is None or self._job.id != job.id:
                    return
                job = replace(job, step="scoring the held-out images", bundle_hash=found["bundle_hash"])
                job = replace(job, promise=(found.get("operating_point") or {}).get("promise"))
                self._save(job)
            maps = str(folder / "maps")
            output = self._run(job, "predict", made, str(folder / "held_out"), "--maps", maps)
            scored = [json.loads(line) for line in output.encode().splitlines()]  # names may have other separators
            for one, row in zip(job.held_out, scored, strict=True):
                if row["error"] is not None:
                    raise DataError(f"{one.name}: {row['error']}")
            held_out = [
                HeldOutImage(one.name, row["verdict"], row["pred_score"], row["threshold"], row["subclass"])
                for one, row in zip(job.held_out, scored, strict=True)
            ]
            job = replace(job, state="done", step="", held_out=tuple(held_out))
        except Exception as error:
            if not isinstance(error, NormweaveError | OSError):
                log.exception("Teaching failed")
            job = replace(job, state="failed", step="", error=str(error))
        with self._lock:
            if not self._stopping and self._job is not None and self._job.id == job.id:
                self._save(replace(job, ended_at=datetime.now(UTC)))

    def _run(self, job: TeachJob, *arguments: str) -> str:
        """Run a command at the lowest priority, and return what it printed.

        Raises:
            DataError: it failed.
        """
        with self._lock:
            if self._stopping or self._job is None or self._job.id != job.id:
                raise DataError("The training was ended.")
            # The process ends at the end of its input, which comes when this server ends, even by SIGKILL.
            stdin, alive = os.pipe()
            process = subprocess.Popen(
                [*self.program, *arguments, "--json", "--quiet", "--threads", "1"],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                creationflags=getattr(subprocess, "BELOW_NORMAL_PRIORITY_CLASS", 0),  # of Windows
            )
            os.close(stdin)
            self._process = process
            if sys.platform != "win32":
                os.setpriority(os.PRIO_PROCESS, process.pid, LOWEST_PRIORITY)
        try:
            output, errors = process.communicate()
        finally:
            os.close(alive)
        with self._lock:
            if self._process is process:
                self._process = None
        if process.returncode not in (0, 1, _UNREADABLE):
            raise DataError(_reason(output, errors) or f"The command ended with {process.returncode}.")
        return output

    # ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _folder(self, job: TeachJob) -> Path:
        return self.folder / str(job.id)

    def _save(self, job: TeachJob) -> None:
        text = json.dumps(asdict(job), default=str)
        try:  # first the file: what is shown as done is done after a restart, too
            write_atomically(self._folder(job) / "job.json", lambda path: path.write_text(text, "utf-8"))
        finally:
            self._job = job

    def _restore(self) -> TeachJob | None:
        """Return the job of the last run of the server; remove what cannot be used."""
        found = None
        for folder in sorted(self.folder.glob("*")):
            try:
                found = _parse((folder / "job.json").read_text("utf-8"))
            except (OSError, ValueError, KeyError, TypeError):
                shutil.rmtree(folder, ignore_errors=True)
        if found is not None and found.state == "training":
            error = "The server ended while it was training. Nothing of it is kept: start again."
            found = replace(found, state="interrupted", step="", ended_at=datetime.now(UTC), error=error)
            for part in ("bundle", "maps"):
                shutil.rmtree(self._folder(found) / part, ignore_errors=True)
            self._job = found
            self._save(found)
        return found

    def _remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _checked(self, id: int, *states: str) -> TeachJob:
        job = self._job
        if job is None or job.id != id:
            raise TeachError(f"There is no job {id}, or it was thrown away.", code="teach_unknown", status=404)
        if job.state not in states:
            raise TeachError(f"The job is {job.state}, and must be {' or '.join(states)}.", code="teach_state")
        return job

    def _audit(self, event: Literal["teach_kept", "teach_discarded"], job: TeachJob, actor: Actor) -> None:
        detail = {"category": job.category, "subclass": job.subclass, "bundle_hash": job.bundle_hash}
        self._service.store.add_audit(event, actor=actor.name, token=actor.token, detail=detail)


def _wrong(detail: str) -> TeachError:
    return TeachError(detail, code="teach_input", status=422)


def _write_images(folder: Path, uploads: Sequence[Upload]) -> None:
    folder.mkdir(parents=True)
    for number, upload in enumerate(uploads):
        suffix = mimetypes.guess_extension(media_type(upload.content)) or ".png"
        (folder / f"{number:03d}{suffix}").write_bytes(upload.content)


def _parse(text: str) -> TeachJob:
    values: dict[str, Any] = json.loads(text)
    values["held_out"] = tuple(HeldOutImage(*one) for one in values["held_out"])
    for name in ("started_at", "ended_at"):
        values[name] = values[name] and datetime.fromisoformat(values[name])
    return TeachJob(**values)


def _reason(output: str, errors: str) -> str:
    for line in reversed(output.splitlines()):
        try:
            return str(json.loads(line)["error"])
        except (ValueError, KeyError, TypeError):
            continue
    return " ".join(errors.split())[-500:]


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_") or "_"
