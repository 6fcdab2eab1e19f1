"""Run a notebook from the command line and keep what it shows, whatever happens on the way.

nbclient runs the cells. A run that fails, hangs, dies or is interrupted still leaves the notebook
as far as it came, and a page of it.
"""

import ast
import asyncio
import contextlib
import queue
import sys
import textwrap
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import zmq
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec, NoSuchKernel
from jupyter_client.manager import AsyncKernelManager, KernelManager
from jupyter_core.utils import ensure_async, run_sync
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert.filters import strip_ansi
from nbformat import NotebookNode
from traitlets import default

from emotion_toolbox.files import write_text
from notebook_builder import notebook_text
from notebook_page import make_page
from notebook_sources import BuildError

PARAMETERS, INJECTED = "parameters", "injected-parameters"  # papermill's tags
WIDGET = "application/vnd.jupyter.widget-view+json"
MEMORY_HINT = (
    "Most often the memory ran out: lower BATCH_SIZE (--set BATCH_SIZE=16), or IMG_SIZE, or "
    "CACHE_SIZE."
)
PASSED_ON = "epoch "  # how lines begin that the terminal shows as they come
GRACE = 60.0  # seconds that an interrupted cell has to finish what it is doing
SLOW_CELL = 1.0  # seconds from which a cell is worth a line
INTERRUPTED = 130  # the exit status of a command stopped by Ctrl-C


class Kernels(AsyncKernelManager):
    """Starts ``python3`` under the running interpreter, wherever a kernel of that name leads."""

    @default("transport_encryption")
    def _encrypt_where_possible(self) -> str:
        """Newer kernels warn on a plain connection; older ones have no such setting."""
        return "auto" if zmq.has("curve") else "disabled"

    @property
    def kernel_spec(self) -> KernelSpec | None:
        """ipykernel's own description of a kernel, which begins with ``sys.executable``."""
        if self.kernel_name == "python3":
            return KernelSpec(**get_kernel_dict())
        return super().kernel_spec

    async def _async_interrupt_kernel(self) -> None:
        """None before a shutdown: an idle kernel logs it as an error, a busy one is killed."""
        if not self.shutting_down:
            await super()._async_interrupt_kernel()


class Client(NotebookClient):
    """Shows a cell's lines that begin with ``epoch`` on the terminal too, as they come."""

    rest = ""

    def process_message(self, msg: dict[str, Any], cell: NotebookNode, cell_index: int) -> Any:
        """As nbclient does."""
        if msg["msg_type"] == "stream" and msg["content"]["name"] == "stdout":
            *lines, self.rest = (self.rest + msg["content"]["text"]).split("\n")
            print("".join(f"{x}\n" for x in lines if x.startswith(PASSED_ON)), end="", flush=True)
        return super().process_message(msg, cell, cell_index)


def inject_overrides(notebook: NotebookNode, overrides: Mapping[str, Any]) -> None:
    """Add `overrides` to ``OVERRIDES`` in a cell after the one tagged ``parameters``."""
    if not overrides:
        return
    tagged = [i for i, c in enumerate(notebook.cells) if PARAMETERS in c.metadata.get("tags", [])]
    if not tagged:
        raise BuildError(f"no cell is tagged {PARAMETERS!r}, so --set has nowhere to go")
    values = "".join(f'    "{name}": {value!r},\n' for name, value in overrides.items())
    cell = nbformat.v4.new_code_cell(  # type: ignore[no-untyped-call]
        f"OVERRIDES = {{\n    **OVERRIDES,\n{values}}}", id=INJECTED, metadata={"tags": [INJECTED]}
    )
    notebook.cells.insert(tagged[0] + 1, cell)


# --- running ------------------------------------------------------------------------------------


def run_notebook(
    notebook: NotebookNode,
    stem: str,
    cwd: Path,
    fallback: Path,
    results: Path | None = None,
    timeout: int | None = None,
    kernel: str = "python3",
) -> int:
    """Run every code cell of `notebook` in `cwd`, save notebook and page, return the exit status.

    They are saved as ``<stem>_executed.ipynb`` and ``.html`` in `results`, else in the folder the
    notebook calls ``run_dir``, else in `fallback`.

    Args:
        timeout: seconds a cell may take; None or a negative number: any time.
        kernel: ``python3`` is always the running interpreter; other names are Jupyter's.
    """
    client = Client(
        notebook,
        timeout=timeout if timeout and timeout > 0 else None,
        kernel_name=kernel,
        kernel_manager_class=Kernels,
        resources={"metadata": {"path": str(cwd)}},
        coalesce_streams=True,
        store_widget_state=False,
    )
    status, message, run_dir = _run_cells(client)
    print(message, file=sys.stderr if status else sys.stdout, flush=True)
    for cell in notebook.cells:  # a bar or a button is nothing without a kernel
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
    folder = (results or run_dir or fallback).resolve()
    page = partial(make_page, title=stem.replace("_", " "))
    for suffix, make in ((".ipynb", notebook_text), (".html", page)):
        path = folder / f"{stem}_executed{suffix}"
        write_text(path, make(notebook))
        print(path)
    return status


def _run_cells(client: NotebookClient) -> tuple[int, str, Path | None]:
    """Run the cells in order, up to the first that does not end well.

    Returns the exit status, what to tell the user, and the run's own folder as far as it is known.
    """
    cell: NotebookNode | None = None
    run_dir: Path | None = None
    started, section = time.monotonic(), ""
    code = [(index, cell) for index, cell in enumerate(client.nb.cells) if cell.cell_type == "code"]
    try:
        with client.setup_kernel():
            for count, (index, cell) in enumerate(code, start=1):
                place, begun = f"cell {count}/{len(code)}  ", time.monotonic()
                if section != (section := cell.id.rpartition("-")[0]):
                    print(f"{place}{section}", flush=True)
                failed = _run_cell(client, cell, index)
                if (seconds := time.monotonic() - begun) >= SLOW_CELL:
                    print(f"{place}{cell.id}: {seconds:.1f} s", flush=True)
                run_dir = ask_run_dir(client) or run_dir
                if failed:
                    raise failed
    except NoSuchKernel as error:
        return 1, f"error: Jupyter knows no kernel {error.name!r}; try --kernel python3", run_dir
    except (CellExecutionError, CellTimeoutError, RuntimeError) as error:  # a dead kernel's too
        return 1, describe_failure(error, cell), run_dir
    except KeyboardInterrupt:
        return INTERRUPTED, f"interrupted in cell {cell.id if cell else 'none'}", run_dir
    return 0, f"ran all {len(code)} code cells in {time.monotonic() - started:.1f} s", run_dir


def _run_cell(client: NotebookClient, cell: NotebookNode, index: int) -> CellExecutionError | None:
    """Run one cell; the kernel of one that raises is still there to be asked."""
    try:
        client.execute_cell(cell, index)
    except CellExecutionError as error:
        return error
    except (CellTimeoutError, KeyboardInterrupt):
        print(f"waiting up to {GRACE:.0f} s for the cell to end (Ctrl-C: kill it)", file=sys.stderr)
        run_sync(_interrupt)(client)
        raise
    return None


async def _interrupt(client: NotebookClient) -> None:
    """Interrupt the cell as Jupyter's stop button does, and let it save what it has."""
    assert client.km is not None
    listening = asyncio.all_tasks() - {asyncio.current_task()}  # nbclient's, for the cell's output
    await ensure_async(client.km.interrupt_kernel())
    await _wait_until_idle(client.km)
    if listening:
        ended, _ = await asyncio.wait(listening, timeout=5)
        for task in ended:
            if not task.cancelled():
                task.exception()  # seen, so asyncio need not complain that nobody did


async def _wait_until_idle(manager: KernelManager) -> None:
    """Wait up to ``GRACE`` seconds for the kernel to end its cell.

    What nbclient listens with may have ended with the interrupt, so the kernel itself is asked: it
    answers once it is done.
    """
    asking = manager.client()
    asking.start_channels()
    try:
        asking.execute("", silent=True)
        answer: Any = asking.get_shell_msg(timeout=GRACE)
        with contextlib.suppress(queue.Empty):
            await ensure_async(answer)
    finally:
        asking.stop_channels()


def ask_run_dir(client: NotebookClient) -> Path | None:
    """The folder of the run, where a cell has defined ``run_dir`` by now."""
    assert client.kc is not None
    wanted = {"run_dir": "str(run_dir.resolve())"}
    request = client.kc.execute("", silent=True, store_history=False, user_expressions=wanted)
    reply = client.wait_for_reply(request)
    answer = (reply or {}).get("content", {}).get("user_expressions", {}).get("run_dir", {})
    if answer.get("status") != "ok":
        return None
    return Path(ast.literal_eval(answer["data"]["text/plain"]))


def describe_failure(error: Exception, cell: NotebookNode | None) -> str:
    """The cell that failed, why it did, and what may help."""
    if cell is None:
        return f"error: the kernel did not start: {error}"
    source = textwrap.indent(cell.source, "    ")
    if isinstance(error, CellExecutionError):  # the traceback shows the source
        lines = [line for o in cell.outputs for line in o.get("traceback", [])]
        why = "\n".join(lines) or f"{error.ename}: {error.evalue}"
        why = why if sys.stderr.isatty() else strip_ansi(why)  # type: ignore[no-untyped-call]
        no_memory = "out of memory" in f"{error.ename} {error.evalue}".lower()
        why += f"\n{MEMORY_HINT}" if no_memory else ""
    elif isinstance(error, CellTimeoutError):
        why = f"{source}\n\nIt did not end in time: give it longer (--timeout), or less to do."
    elif isinstance(error, DeadKernelError):
        why = f"{source}\n\nThe kernel died while this cell ran. {MEMORY_HINT}"
    else:
        why = f"{source}\n\n{type(error).__name__}: {error}"
    return f"error: cell {cell.id} failed\n\n{why}".rstrip()
