"""The flags of `--serve`, which is a mode too."""

from dataclasses import dataclass

from preflight.settings.options import setting


@dataclass(frozen=True)
class ServingSettings:
    """What `--serve` serves, to whom, and where."""

    serve: tuple[str, ...] = setting(
        (),
        "runs or checkpoints to serve, each under the name of its run's folder; a run stands for "
        "its best checkpoint; the first is the default, the others are loaded when asked for",
        metavar="RUN",
    )
    host: str = setting(
        "127.0.0.1",
        "the address to listen on; any other than this machine's own needs --api-key-file",
    )
    port: int = setting(8000, "the port to listen on; 0: any that is free", ge=0, le=65535)
    serve_rows: int = setting(
        8,
        "answers that a model generates at once; each has a cache of a whole context",
        metavar="N",
        ge=1,
        le=1024,
    )
    api_key_file: str | None = setting(
        None,
        "clients must send the key in this file, which is made where it is not there",
        metavar="FILE",
    )
    cors_origin: tuple[str, ...] = setting(
        (),
        "web pages that may call the server from a browser, such as https://chat.example.org",
        metavar="ORIGIN",
    )
