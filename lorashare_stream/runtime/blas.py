"""One thread of BLAS, OpenMP and torch a task: their number decides the last bits, and tasks are parallel."""

from __future__ import annotations

import os
import sys
import threading

VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
_thread = threading.local()


def one_thread() -> None:
    """Limit this thread, and the BLAS of its process, to one thread for good; libraries that come later too."""
    torch = sys.modules.get("torch")  # not imported for this: what does not use it shall not pay for it
    if torch is not None:
        torch.set_num_threads(1)
    if getattr(_thread, "limited", False):
        return
    os.environ.update(dict.fromkeys(VARIABLES, "1"))
    import scipy.linalg.cython_blas  # noqa: F401 - loads its BLAS
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)
    _thread.limited = True
