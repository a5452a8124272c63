"""Bandwidth of this machine's memory: how fast its cores read it, and how fast they copy it.

    python benchmarks/bandwidth.py [--threads 2] [-o RESULT.json]

A few lines of C, compiled on the spot, add up a buffer far larger than the caches, each thread its own part of it, or
copy one half to the other. A decode step reads every weight of the decoder once: read bandwidth over bytes of weights
is the most tokens a second that the machine allows.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from measuring import circumstances, save

MEGABYTES = 1024
REPETITIONS = 6
"""Of which the first does not count."""

COMPILERS = ("gcc", "clang", "cc")
SOURCE = r"""
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define LANES 64 /* words that are added side by side: a compiler makes vectors of them */
#define MOST 256

static struct shared {
    uint64_t *words;
    size_t per_thread;
    int repetitions, copies;
    double *seconds;
    pthread_barrier_t gate;
} shared;
static uint64_t results[MOST];

static double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + 1e-9 * (double)at.tv_nsec;
}

static uint64_t added(const uint64_t *words, size_t count) {
    uint64_t lanes[LANES] = {0}, sum = 0;
    for (size_t at = 0; at + LANES <= count; at += LANES)
        for (size_t lane = 0; lane < LANES; lane++) lanes[lane] += words[at + lane];
    for (size_t lane = 0; lane < LANES; lane++) sum += lanes[lane];
    return sum;
}

static void *work(void *number) {
    size_t mine = (size_t)number, count = shared.per_thread;
    uint64_t *words = shared.words + mine * count;
    for (int turn = 0; turn < shared.repetitions; turn++) {
        pthread_barrier_wait(&shared.gate);
        double began = now();
        if (shared.copies) memcpy(words, words + count / 2, count / 2 * sizeof *words);
        else results[mine] += added(words, count);
        pthread_barrier_wait(&shared.gate);
        if (mine == 0) shared.seconds[turn] = now() - began;
    }
    return 0;
}

/* Seconds of each repetition over all threads' words; 0 where all went well. */
int measure(size_t bytes, int threads, int repetitions, int copies, double *seconds) {
    pthread_t started[MOST];
    void *memory = 0;
    if (threads < 1 || threads > MOST || posix_memalign(&memory, 4096, bytes)) return 1;
    memset(memory, 1, bytes);
    shared.words = memory;
    shared.per_thread = bytes / sizeof(uint64_t) / (size_t)threads / (2 * LANES) * (2 * LANES);
    shared.repetitions = repetitions, shared.copies = copies, shared.seconds = seconds;
    pthread_barrier_init(&shared.gate, 0, (unsigned)threads);
    for (size_t one = 0; one < (size_t)threads; one++)
        if (pthread_create(&started[one], 0, work, (void *)one)) return 2;
    for (int one = 0; one < threads; one++) pthread_join(started[one], 0);
    pthread_barrier_destroy(&shared.gate);
    free(memory);
    return 0;
}
"""


class MemoryBandwidth:
    """The compiled measurement."""

    def __init__(self) -> None:
        compiler = os.environ.get("CC") or next((name for name in COMPILERS if shutil.which(name)), None)
        if compiler is None:
            raise OSError(f"want a C compiler, found none of {', '.join(COMPILERS)}; name one in the variable CC")
        with tempfile.TemporaryDirectory() as place:
            source, library = Path(place, "bandwidth.c"), Path(place, "bandwidth.so")
            source.write_text(SOURCE, encoding="utf-8")
            flags = ("-O3", "-march=native", "-shared", "-fPIC", "-pthread")
            subprocess.run([compiler, *flags, "-o", str(library), str(source)], check=True)
            self._measure = ctypes.CDLL(str(library)).measure
        self._measure.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]

    def read(self, threads: int, megabytes: int = MEGABYTES) -> float:
        """GB/s that ``threads`` threads read, the median of the repetitions."""
        return self._rate(threads, megabytes, copies=0)

    def copy(self, threads: int, megabytes: int = MEGABYTES) -> float:
        """GB/s that ``threads`` threads copy: bytes read plus bytes written."""
        return self._rate(threads, megabytes, copies=1)

    def _rate(self, threads: int, megabytes: int, copies: int) -> float:
        seconds = (ctypes.c_double * REPETITIONS)()
        size = megabytes << 20
        if self._measure(size, threads, REPETITIONS, copies, ctypes.addressof(seconds)):
            raise OSError(f"{threads} threads over {megabytes} MB: no memory or no threads; give fewer")
        return round(size / statistics.median(list(seconds)[1:]) / 1e9, 2)


def measure(threads: int) -> dict[str, Any]:
    """GB/s by kind and threads."""
    bandwidth = MemoryBandwidth()
    counts = sorted({1, threads})
    return {
        "threads": threads,
        "read_gb_per_s": {str(count): bandwidth.read(count) for count in counts},
        "copy_gb_per_s": {str(count): bandwidth.copy(count) for count in counts},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    result = {**circumstances(), **measure(arguments.threads)}
    print(json.dumps(result))
    if arguments.output is not None:
        save(arguments.output, result)


if __name__ == "__main__":
    main()
