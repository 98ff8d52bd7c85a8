"""`normweave serve`: a server with a REST interface and web pages for a bundle, or for a library of bundles."""

import socket
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated, get_args

import typer

from normweave.cli import options
from normweave.cli.terminal import ALL_NORMAL, Terminal
from normweave.errors import ConfigError, DataError, MissingError, unknown

MIB = 2**20
_LIMITS = "Limits"


def serve(
    terminal: Terminal,
    bundle: options.OneBundle = None,
    host: Annotated[str, typer.Option(help="Address to listen on. 0.0.0.0 allows other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on. 0 = any free port.")] = 8080,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of the inspections.", show_default="'inspections' next to the bundle or library"),
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(help="postgresql://… instead of SQLite in the folder of the inspections.", show_default=False),
    ] = None,
    name: Annotated[
        str,
        typer.Option(help="Name of the line, shown on all pages and kept with each inspection.", show_default=False),
    ] = "",
    watch: Annotated[
        Path | None,
        typer.Option(help="Folder of a camera. New images in it are inspected.", show_default=False),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="YAML file of the sources and outputs of the line.", show_default=False),
    ] = None,
    view_bundle: Annotated[
        list[str] | None,
        typer.Option(
            help="VIEW=BUNDLE: the bundle of a view of the parts; all other images have the active one. Repeatable.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="Folder or s3://… of the images, which several servers of the line share. Needs PostgreSQL.",
            show_default=False,
        ),
    ] = None,
    library: Annotated[
        Path | None,
        typer.Option(
            help="Folder of bundles, instead of BUNDLE. One inspects, another one can be in its shadow.",
            show_default=False,
        ),
    ] = None,
    active: Annotated[
        str | None,
        typer.Option(
            help="Name of the bundle of the library that inspects.", show_default="the one that was active before"
        ),
    ] = None,
    shadow_share: Annotated[
        float,
        typer.Option(help="Highest share of a processor for the bundle in the shadow.", rich_help_panel=_LIMITS),
    ] = 0.25,
    new_token: Annotated[
        str | None,
        typer.Option(help="Create another token with this role: operator or engineer.", show_default=False),
    ] = None,
    no_token: Annotated[
        bool, typer.Option("--no-token", help="Do not require tokens. Only for connections of this machine.")
    ] = False,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="PEM file of the certificate, for https.", show_default=False)
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its key.", show_default=False)] = None,
    keep_days: Annotated[
        float,
        typer.Option(min=0, help="Remove inspections older than this. 0 = never.", rich_help_panel=_LIMITS),
    ] = 0,
    keep_gib: Annotated[
        float,
        typer.Option(
            min=0,
            help="Remove the oldest images if they take more space. 0 = never.",
            rich_help_panel=_LIMITS,
        ),
    ] = 0,
    max_waiting: Annotated[
        int,
        typer.Option(min=1, help="The most waiting images. Further requests get status 429.", rich_help_panel=_LIMITS),
    ] = 64,
    max_images: Annotated[
        int, typer.Option(min=1, help="The most images of one request.", rich_help_panel=_LIMITS)
    ] = 32,
    max_image_mib: Annotated[float, typer.Option(help="Largest file size of an image.", rich_help_panel=_LIMITS)] = 32,
    max_megapixels: Annotated[
        float, typer.Option(help="Largest number of pixels of an image.", rich_help_panel=_LIMITS)
    ] = 50,
) -> int:
    """Inspect images from the network or a folder, and store the results. Needs no torch.

    The first start creates a token for each role and prints it once.
    """
    if (bundle is None) == (library is None):
        raise ConfigError("Give one BUNDLE, or a folder of bundles with --library.")
    if active is not None and library is None:
        raise ConfigError("--active chooses a bundle of a library, so it needs --library.")
    if images is not None and (database is None or not database.startswith("postgresql")):
        raise ConfigError(
            "--images is for several servers of a line, which need --database postgresql://…; got "
            f"{'no --database' if database is None else 'another database'}. One server stores its images in --data."
        )
    if (tls_certificate is None) != (tls_key is None):
        raise ConfigError("TLS needs both --tls-certificate and --tls-key.")
    if watch is not None and not watch.is_dir():
        raise DataError(f"The folder {watch} does not exist. Create it, or leave out --watch.")
    try:
        from normweave import serve as server
        from normweave.cli.parts import load_views, parse_view_bundles
        from normweave.serve import line_config, outputs, process
        from normweave.serve.access import Access
        from normweave.serve.authentication import is_loopback
        from normweave.serve.config import ServeConfig
        from normweave.serve.delivery import Deliveries
        from normweave.serve.files import Files, ImageStore
        from normweave.serve.library import Library
        from normweave.serve.models import Models, choose_active
        from normweave.serve.object_files import ObjectFiles
        from normweave.serve.records import Role
        from normweave.serve.replicas import Replica, SoleServer
        from normweave.serve.seen import Seen
        from normweave.serve.service import InspectionService
        from normweave.serve.source import SourceRunner
        from normweave.serve.store import Store
        from normweave.serve.watch import Watch
    except ImportError as error:
        raise MissingError(
            f'The server needs {error.name}, which is not installed: pip install "normweave[serve]"'
        ) from error
    from normweave.data.stored import is_url
    from normweave.detector import Detector
    from normweave.outcome.parts import check_named

    if no_token and not is_loopback(host):
        raise ConfigError(
            f"--no-token gives everyone who can connect to {host} all rights. Listen on 127.0.0.1, or use tokens."
        )
    certificate = None
    if tls_certificate is not None and tls_key is not None:
        certificate = tls_certificate, tls_key
        process.check_certificate(*certificate)
    if new_token is not None and new_token not in get_args(Role):
        raise unknown(
            "role", new_token, get_args(Role), "An operator inspects and reviews. An engineer has all rights."
        )
    line = line_config.LineConfig() if config is None else line_config.read(config)
    name = name or line.name
    if len(name) > line_config.NAME_LENGTH or not name.isprintable():
        raise ConfigError(
            f"--name must have at most {line_config.NAME_LENGTH} printable characters, got {name[:200]!r}."
        )
    name = name.strip()
    of = "parts.views of the file of --config"
    given = parse_view_bundles(view_bundle or (), line.parts.views, of=of)
    if given and (unnamed := check_named(line.parts.views, what="--view-bundle", of=of)):
        raise ConfigError(f"{unnamed[0]}.")
    of_views = line.view_bundles | given
    receivers = outputs.build(line.outputs, line=name)
    limits = ServeConfig(
        max_waiting=max_waiting,
        max_images=min(max_images, max_waiting),
        max_image_bytes=int(max_image_mib * MIB),
        max_request_bytes=int(max(128, 2 * max_image_mib) * MIB),
        max_pixels=int(max_megapixels * 1e6),
        keep_days=keep_days,
        keep_gib=keep_gib,
        shadow_share=shadow_share,
    )

    def load(path: Path) -> Detector:
        return Detector.load(path, threads=terminal.threads, device=terminal.device)

    detector = None if bundle is None else load(bundle)
    views = load_views(
        of_views, load, named=lambda view: f"--view-bundle {view}" if view in given else f"view_bundles.{view}"
    )
    bundles = None if library is None else Library(library.resolve())
    where = bundle or library
    assert where is not None  # one of them was given
    folder = where.resolve().parent / "inspections" if data is None else data
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if images is not None:  # else the folder of the images has a lock
            stack.enter_context(closing(SoleServer(folder)))
        files: ImageStore
        if images is None:
            files = Files(folder / server.FILES)
        elif is_url(images):
            files = ObjectFiles(images)
        else:
            files = Files(Path(images), shared=True)
        stack.callback(files.close)
        files.sweep()
        listening = stack.enter_context(process.listen(host, port))
        store = Store.open(database or folder / server.DATABASE, line=name)
        stack.callback(store.close)
        replica = None
        if store.database.is_shared:
            replica = Replica(
                store.database,
                line=name,
                images=files.identity,
                server=store.server,
                watches=watch is not None,
                address=f"{socket.gethostname()}:{listening.getsockname()[1]}",
            )
            stack.callback(replica.close)
        elif database is not None:
            stack.enter_context(closing(SoleServer(store.database.path)))
        files.claim(store.identity())  # when nothing else is wrong: it lasts
        if detector is None and bundles is not None:
            detector = load(choose_active(bundles, store, name=active).path)
        assert detector is not None
        access = None
        if not no_token:
            access = Access(store, session_hours=limits.session_hours, session_max_hours=limits.session_max_hours)
        tokens = [] if access is None else access.create_first_tokens()
        if access is not None and new_token is not None:
            tokens.append(access.create(name=new_token, role="engineer" if new_token == "engineer" else "operator"))
        service = InspectionService(detector, store=store, files=files, config=limits, folder=folder, views=views)
        service.part_rule = line.parts
        stack.callback(service.stop)
        if bundles is not None:
            service.models = Models(bundles, service=service, load=load, device=terminal.device)
            service.models.resume()
        watching = None
        if watch is not None:
            seen = stack.enter_context(closing(Seen(folder / server.SEEN)))
            watching = Watch(watch.resolve(), service=service, seen=seen)
        delivering = Deliveries(service, receivers)
        sources = [SourceRunner(one, service) for one in line.sources]
        app = server.create_app(
            service, access=access, watch=watching, outputs=delivering, sources=sources, replica=replica
        )
        address = listening.getsockname()
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        url = f"{'http' if certificate is None else 'https'}://{shown}:{address[1]}"
        if terminal.json:
            terminal.record(
                {
                    "url": url,
                    "bundle_hash": detector.bundle_hash,
                    "view_bundles": dict(service.detectors.view_hashes),
                    "data": str(folder),
                    "tokens": [{"name": new.token.name, "role": new.token.role, "token": new.secret} for new in tokens],
                }
            )
        else:
            for new in tokens:
                terminal.show(f"Token of the {new.token.role}, printed only once: {new.secret}")
            places = str(folder) if database is None else f"{store.database.name}, their images in {files.name}"
            terminal.show(f"Serving {where} at {url}. Results are stored in {places}. Stop with Ctrl+C.")
        if certificate is None and not is_loopback(host):
            terminal.remark("Tokens and images are sent unencrypted: use TLS, or a proxy with TLS.")
        process.run(app, listening, config=limits, certificate=certificate)
    return ALL_NORMAL
