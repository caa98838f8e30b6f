"""What holds for every test, and for what it starts."""

import os
import shutil
import tempfile

from threadpoolctl import threadpool_limits

# Of more threads than cores, those of BLAS spin: two processes with two each take twice the CPU time, three ten times.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
threadpool_limits(1)  # of what a plugin has imported already
# Files lie in memory where there is plenty: nothing is tested by waiting for a disk to sync.
if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 6 << 30:
    os.environ["TMPDIR"] = tempfile.tempdir = "/dev/shm"
