"""What holds for every test, and for what it starts; set before numpy and torch are imported."""

import os
import shutil
import tempfile

# Two processes of tests with two threads each take twice the CPU time on two cores.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# Files lie in memory where there is plenty: nothing is tested by waiting for a disk to sync.
if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 6 << 30:
    os.environ["TMPDIR"] = tempfile.tempdir = "/dev/shm"
