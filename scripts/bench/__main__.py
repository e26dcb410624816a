"""One command per benchmark."""

import typer

from scripts.bench.accumulation import Accumulation
from scripts.bench.checkpoint import Checkpoint
from scripts.bench.fingerprint import Fingerprint
from scripts.bench.gpu import Gpu
from scripts.bench.harness import command_of
from scripts.bench.host import Host
from scripts.bench.kernel import Kernel
from scripts.bench.links import Links
from scripts.bench.memory import Memory
from scripts.bench.metrics import Metrics
from scripts.bench.overlap import Overlap
from scripts.bench.parameters import Parameters
from scripts.bench.planning import Planning
from scripts.bench.plots import Plots
from scripts.bench.step import Step

OF_TRAINING = (Step, Memory, Overlap, Links, Host, Metrics, Checkpoint, Planning)
BENCHMARKS = (*OF_TRAINING, Kernel, Parameters, Fingerprint, Accumulation, Gpu, Plots)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
for benchmark in BENCHMARKS:
    app.command(benchmark.__name__.lower())(command_of(benchmark))

if __name__ == "__main__":
    app()
