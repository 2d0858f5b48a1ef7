"""Mutants of every file that a command reads, through every command: tests/fuzz.py runs as many as one has time for."""

import os

import fuzz
import pytest

CASES = int(os.environ.get('FUZZ_CASES', 60))


@pytest.mark.slow
def test_no_mutant_gets_through(tmp_path):
    found = fuzz.fuzz(list(fuzz.TARGETS), CASES, seed=0, folder=tmp_path)
    assert len(found) > 0.8 * CASES and {case.target for case in found} >= {'predict_run', 'train_ends', 'results'}
    assert not [case for case in found if case.fault], fuzz.table(found)
    assert sum(case.status == 2 for case in found) > len(found) / 4, 'mutants that change nothing'
