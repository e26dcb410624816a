"""Change one line of the package at a time and run the tests that should fail: scripts/mutate.py [--help]

A test suite is as good as the defects that it notices. Each row of MUTATIONS is a defect, with the test files that
should fail then. The rows were chosen before the tests were first cut, and stay: a cut that lets one more of them
survive has lost a proof. To compare two suites on today's package, run it twice, once with `--tests COMMIT`.

It runs in a temporary copy, so that the checkout never changes. It prints for each mutation one of

    killed    with the first test that failed; that a test fails without the mutation too is for you to rule out
    survived  the tests passed
    gone      the old text is no longer there; the row wants another one
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 900  # of a mutation; a hang is killed by tests/pool.py or tests/simulated.py long before

# By file of the package: the text, what to put there, and which tests/test_*.py should fail, the cheapest first.
MUTATIONS = {
    "update/adamw.py": [
        ("(1 - hyper.beta1) * grad", "(1 - hyper.beta2) * grad", "law"),
        ("bias_correction2.sqrt() + hyper.eps", "bias_correction2.sqrt()", "law kernels"),
        ("descent) / (1 - hyper.decay)", "descent)", "metrics"),
        ("_select_(exp_avg_sq, new_exp_avg_sq, keep)", "exp_avg_sq.copy_(new_exp_avg_sq)", "law"),
    ],
    "update/hyperparameters.py": [
        ('float(group.get("max_lr", 0.0))', "0.0", "law"),
        ("hyper.decay >= 1.0", "hyper.decay >= 2.0", "law contract"),
    ],
    "update/precision.py": [
        ("+ 0x8000) >> 16", "+ 0x7FFF) >> 16", "precision law kernels"),
        ("low.clamp(min=0), low)", "low, low)", "precision kernels"),
        (".eps <= 2  #", ".eps <= 1  #", "precision"),
    ],
    "update/storage.py": [
        ("self.moments.itemsize < 4 and", "self.moments.itemsize < 2 and", "precision contract"),
    ],
    "kernels/torch_kernel.py": [
        ("if column != _GRAD:", "if column > 1:", "kernels"),
        ("grad_scale=step.divisor", "grad_scale=None", "kernels"),
        ("hyper.weight_decay / hyper.initial_lr", "hyper.weight_decay", "kernels"),
    ],
    "kernels/numba_kernel.py": [
        ("_larger(maximum, exp_avg_sq)\n", "maximum\n", "kernels"),
        ("else next_key_high)", "else key_high)", "kernels"),
        ("min(first_tile + _CLAIM, call.tiles)", "min(first_tile + 1, call.tiles)", "kernels"),
        ("uint32(_canonical(value) + uint32(0x8000))", "_canonical(value)", "kernels"),
    ],
    "kernels/numba_exact_squares.py": [
        ("lower_sum += int64(np.rint((square - upper) * unit))", "lower_sum += 0", "same_run"),
    ],
    "kernels/fingerprint.py": [
        ("mul_(rows.stride - rows.length)", "mul_(rows.stride)", "fingerprint"),
    ],
    "kernels/numba_fingerprint.py": [
        ("length * stride + within", "length * stride", "fingerprint"),
    ],
    "layout/indices.py": [
        ("base + number * stride, first", "base, first", "fingerprint"),
    ],
    "layout/boxes.py": [
        ("(first + 1) * row)", "(first + 2) * row)", "state_dict"),
    ],
    "layout/bucket_layout.py": [
        ("bisect_right(self.offsets, shard_start) - 1)", "bisect_right(self.offsets, 0))", "layout sharded"),
        ("start - shard_start if inside else 0", "start - offset if inside else 0", "layout sharded"),
        ("% ALIGNMENT != 0)) for", "% ALIGNMENT == 0)) for", "layout sharded"),
    ],
    "layout/parameters.py": [
        ("if start < stop:", "if start < stop - 4:", "refusals placement contract"),
        ("num_elements += param.numel()", "num_elements += 0", "precision sharded"),
    ],
    "layout/placement.py": [
        ("index * mesh.size(axis) + coordinate[axis]", "coordinate[axis]", "placement precision layouts"),
    ],
    "comm/dtensors.py": [
        ("grad.placements != placements", "False", "placement layouts"),
    ],
    "comm/means.py": [
        ("wire_dtype.itemsize >= dtype.itemsize", "wire_dtype.itemsize > dtype.itemsize", "collectives"),
        ("out.add_(total.div_(len(parts)).to(out.dtype))", "out.copy_(total.div_(len(parts)))", "collectives"),
        ("if rest and sent == total.dtype:", "if rest:", "collectives"),
        ("half = 1 << (len(parts) - 1).bit_length() - 1", "half = len(parts) - 1", "same_run"),  # in rank order
        (".div(divisor)", ".div(len(parts))", "same_run"),
    ],
    "comm/tree.py": [
        ("if count >> level & 1]", "if False]", "same_run"),
    ],
    "comm/messages.py": [
        ("len(self._reductions) >= _REDUCTIONS_RECEIVING", "False", "collectives"),
        ("combine(first, part, out=first)", "first.copy_(part)", "collectives refusals"),
    ],
    "comm/shared_memory.py": [
        ("if theirs != ours:", "if False:", "collectives faults"),
        ("if start + nbytes <= taken:", "if start <= taken:", "collectives sharded"),
    ],
    "comm/mesh.py": [
        ("own = of_all[self._column.rank * piece :][:piece]", "own = of_all[:piece]", "collectives layouts"),
    ],
    "schedule/handshake.py": [
        ("= not _are_equal(note, _SUM)", "= False", "refusals sharded"),
        ("return ~_are_equal(note, _SCALE) |", "return", "overlap"),
        ("smallest * (1 + tolerance)", "smallest * (2 + tolerance)", "refusals contract overlap"),
    ],
    "comm/connect.py": [
        ("if column.num_ranks > 1 else row", "if False else row", "sharded layouts"),
    ],
    "buckets/bucket.py": [
        ("prepared.counted * (1 - step.void)", "prepared.counted", "contract sharded"),
        ("if present[fragment.slot]]", "]", "sharded"),
        ("increment_version(updated)", "pass", "contract"),
        ("first if self.storage.is_stochastic else None", "0 if self.storage.is_stochastic else None", "precision"),
    ],
    "buckets/passes.py": [
        ("carries(self.counts[slot], self.number)", "[0][: self.counts[slot] > 0]", "same_run"),  # one after the other
    ],
    "buckets/build.py": [
        ("bucket.reset_main_()", "pass", "precision sharded"),
        ("self._collectives.broadcast_(whole)", "pass", "sharded"),
    ],
    "buckets/arrangement.py": [
        ("member.gradient_dtype, member.placement", "member.param.dtype, member.placement", "overlap"),
    ],
    "buckets/foreign_gradients.py": [
        ("member.param.grad is not None:\n", "False:\n", "contract sharded"),
        ("num_changes >= 1 for", "num_changes >= 0 for", "sharded contract overlap"),
    ],
    "buckets/full_gradients.py": [
        ("shows &= now.abs()", "now.abs()", "contract overlap refusals"),
        ("return self.buffer._version != self._version", "return False", "contract overlap"),
        ("        else:\n            raise self._too_late(slot)", "", "overlap contract"),
    ],
    "buckets/sharded_gradients.py": [
        ("add, self._holds_a_mean = self._holds_a_mean, True", "add, self._holds_a_mean = False, True", "overlap"),
        ("view.zero_()", "pass", "overlap"),
    ],
    "buckets/offload.py": [
        (", (self._param, self.weights.shard)]", "]", "state_residency"),
    ],
    "buckets/weights.py": [
        ("home.copy_(param.data.clone())", "home.copy_(param.data)", "other_hands"),
    ],
    "buckets/shards.py": [
        ("del groups[first_group:]", "pass", "refusals sharded contract"),
        ("member.local.copy_(whole)", "pass", "sharded contract"),
    ],
    "buckets/admission.py": [
        ("if any(among_us) and", "if False and", "layouts refusals placement"),
    ],
    "schedule/reducer.py": [
        ("if bucket in self._launched:", "if False:", "overlap"),
        ("self._collectives.broadcast_(agreed)", "pass", "overlap"),
        ("for bucket in self._hooked[len(self._launched) :]:", "for bucket in []:", "overlap"),
        ("bucket.gradients.consume()\n        self.num_rounds", "self.num_rounds", "overlap contract"),
        ("self._overlap = False", "pass", "other_hands"),
        ("bucket.gradients.look()", "pass", "other_hands"),
    ],
    "schedule/gatherer.py": [
        ("type(member.param) is Parameter and", "True and", "gatherer layouts"),
        ("self._own if module.training else self._below", "self._own", "gatherer"),
    ],
    "schedule/in_flight.py": [
        ("not in _METADATA and wait_for_all()", "not in _METADATA and True", "gatherer"),
        ("self.bucket.weights.accept_(self._buffer)", "pass", "placement layouts"),
        ("self._give_back(LostParameter)", "self._give_back(Parameter)", "gatherer"),
    ],
    "schedule/step_agreement.py": [
        ("if reducer.is_accumulating:", "if False:", "contract overlap"),
        ("if built != asked_for:", "if False:", "contract"),
        ("            self.require_own_parameters(groups)\n", "", "contract other_hands refusals"),
        ("and all(map(is_, given, self._own)):", "and self._own:", "contract other_hands refusals"),
    ],
    "norms/clipping.py": [
        ("max=1.0)", "max=2.0)", "sharded contract"),
        ("return 1.0 / self.coefficient", "return self.coefficient", "contract sharded"),
        ("self.coefficient * coefficient if", "coefficient if", "contract sharded"),
        ("if not self._is_used and any(", "if False and any(", "metrics"),
    ],
    "norms/held.py": [
        ("if self.shards.adds_in_tree and", "if False and", "same_run"),  # added as it lies
        ("owner[m.name, part] == ranks.rank", "True", "metrics layouts"),
    ],
    "norms/global_norm.py": [
        ("norm = norm.nan_to_num(nan=math.inf", "norm = norm.nan_to_num(nan=0.0", "contract metrics sharded"),
    ],
    "norms/step_report.py": [
        ("skipped + void", "void", "metrics contract"),
    ],
    "norms/composer.py": [
        ("torch.zeros_like(square) if key in zeroed else square", "square", "metrics placement"),
    ],
    "state/state_dict.py": [
        ("if not takes(live", "if False and not takes(live", "state_dict"),
        ("matched = [(piece.live, bucket.main_of_weight(slot))]", "matched = []", "checkpoint"),
        ("(piece.shape, piece.start, stop)", "(piece.shape, saved_start, saved_stop)", "contract"),
    ],
    "state/fingerprint.py": [
        ("cell[1] += word * (1 - len(holders) * is_first)", "pass", "fingerprint"),
        ("cell[0] += word * is_first", "cell[0] += word", "fingerprint"),
    ],
    "state/fragment_tensor.py": [
        ("if func is Tensor.copy_ and not takes(own.dtype, args[1]):", "if False:", "state_dict"),
        ("first + offset for first, offset", "offset for first, offset", "checkpoint"),
    ],
    "checkpoint/folder.py": [
        ("if read and crc != self.crc32:", "if False:", "checkpoint_faults"),
        ("(count - 1))]", "count)]", "checkpoint checkpoint_faults"),
    ],
    "checkpoint/metadata.py": [
        ("if held != expected:", "if False:", "checkpoint_faults interchange"),
    ],
    "checkpoint/entries.py": [
        ("if isinstance(node, str) or path[-1] in node:", "if False:", "checkpoint_faults"),
    ],
    "checkpoint/matching.py": [
        ("if not torch.equal(_part_of", "if False and not torch.equal(_part_of", "checkpoint"),
        ("if not decays or name", "if True or name", "checkpoint"),
        ("join(part, _part_of(saved))", "part.to(live.dtype)", "checkpoint"),
        ("theirs[key] != ours[key]:", "False:", "fingerprint"),
    ],
    "checkpoint/run.py": [
        ("{step} {rank}", "{step}", "checkpoint"),
    ],
    "interchange/convert.py": [
        ("if len(distinct) > 1:", "if False:", "interchange"),
    ],
    "interchange/state_dicts.py": [
        ('float(group["weight_decay"]) / reference if', 'float(group["weight_decay"]) if', "interchange"),
    ],
    "checkpoint/pickles.py": [
        ("acts = not describes and root", "acts = False and root", "torch_file interchange"),
        ("if num_parts > _MOST_PARTS:", "if False:", "torch_file"),
    ],
    "decoupled.py": [
        ("counted = 1.0 if found_inf is None else", "counted = 1.0 if True else", "placement"),
    ],
    "sharded.py": [
        ("self._consolidated.clear()\n        return loss", "return loss", "state_dict"),
        ("is_void = (~largest.isfinite())", "is_void = (largest.isnan())", "contract sharded"),
    ],
    "base.py": [
        ("_ROUNDING = 1e-4", "_ROUNDING = 1e9", "contract law"),
    ],
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression, for the file and its test files")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th mutation, from the I-th on; 0/1 is all")
    parser.add_argument("--tests", metavar="COMMIT", help="take tests/ from this commit, and the package from here")
    parser.add_argument("--list", action="store_true", help="only say which mutations are gone")
    arguments = parser.parse_args()
    part, num_parts = map(int, arguments.part.split("/"))
    rows = [(file, *row) for file, of_file in MUTATIONS.items() for row in of_file]
    chosen = [row for row in rows if re.search(arguments.only, f"{row[0]} {row[3]}")][part::num_parts]
    counts = {"killed": 0, "survived": 0, "gone": 0}
    with tempfile.TemporaryDirectory(prefix="mutate-") as name:
        copy = Path(name)
        _copy_checkout(copy, arguments.tests)
        for file, old, new, tests in chosen:
            start = time.perf_counter()
            path = copy / "sharded_dadamw" / file
            source = path.read_text() if path.exists() else ""
            detail = ""
            if source.count(old) != 1:
                outcome = "gone"
            elif arguments.list:
                continue
            else:
                path.write_text(source.replace(old, new))
                outcome, detail = _run_tests(copy, tests.split())
                path.write_text(source)
            counts[outcome] += 1
            print(f"{outcome:9}{time.perf_counter() - start:5.0f} s  {file}: {old!r} -> {new!r}  {detail}", flush=True)
    print(", ".join(f"{number} {outcome}" for outcome, number in counts.items()), "of", len(chosen))
    return 0


def _copy_checkout(copy: Path, tests_of: str | None) -> None:
    """Copies what git tracks, as it is in the working tree; its tests from another commit where one is named."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=CHECKOUT, check=True, capture_output=True).stdout
    for name in tracked.decode().split("\0")[:-1]:
        if (CHECKOUT / name).is_file() and not (tests_of and name.startswith("tests/")):
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((CHECKOUT / name).read_bytes())
    if tests_of:
        archive = subprocess.run(["git", "archive", tests_of, "tests"], cwd=CHECKOUT, check=True, capture_output=True)
        subprocess.run(["tar", "-x"], cwd=copy, input=archive.stdout, check=True)


def _run_tests(copy: Path, tests: list[str]) -> tuple[str, str]:
    # No bytecode: a change of the same length within a second would be taken for no change.
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    files = [f"tests/test_{name}.py" for name in tests]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    try:
        ran = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return "killed", f"(not done after {TIMEOUT_S} s)"
    if ran.returncode == 0:
        return "survived", ""
    first = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - |$)", ran.stdout, re.MULTILINE)
    return "killed", first[1] if first else ran.stdout[-200:]


if __name__ == "__main__":
    sys.exit(main())
