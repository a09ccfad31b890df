"""`flexi storage-server`: Optuna's gRPC proxy, in front of a database."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer

from flexi_core import FlexiError

from .. import console


@console.one_line_errors
def storage_server(
    storage: Annotated[str, typer.Option(help="Database of the studies, SQLite too.")] = "sqlite:///flexi_studies.db",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 13000,
    threads: Annotated[int, typer.Option(min=1, help="Requests that are answered at once.")] = 10,
) -> None:
    """Serve a database to workers that reach it as grpc://HOST:PORT, until Ctrl-C; for networks where everybody is trusted."""
    from concurrent.futures import ThreadPoolExecutor

    from optuna.exceptions import ExperimentalWarning
    from optuna.storages import get_storage, run_grpc_proxy_server

    from ..study.lock import server_lock
    from ..study.storage import is_database, open_storage, shown

    if not is_database(storage):
        raise FlexiError(f"a storage server serves a database, not {shown(storage)!r}; give sqlite:///FILE or postgresql://...")
    with server_lock(storage), warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        opened = get_storage(open_storage(storage))  # with Optuna's cache, without which every request reads all trials
        console.err.print(f"serving {shown(storage)} at grpc://{host}:{port}", markup=False, highlight=False, soft_wrap=True)
        try:
            run_grpc_proxy_server(opened, host=host, port=port, thread_pool=ThreadPoolExecutor(threads))
        except RuntimeError as error:
            raise FlexiError(f"{host}:{port} cannot be listened on ({error}); give another --host or --port") from error
