"""The recipe that makes on purpose what goes wrong."""

from dataclasses import replace

import symptoms


def test_every_fault_is_run_and_told() -> None:
    found = symptoms.run_all(symptoms.SYMPTOMS[:2] + symptoms.SYMPTOMS[-2:], steps=32)
    assert len(found) == 4
    for each in found:
        assert 0 <= each.accuracy <= 1
        assert 0 < each.relative_drift < 10
        assert 0 < each.agreement <= 1
        assert len(each.distances) == len(each.own_accuracy) == symptoms.WORKERS
    # Half of its learning rate would move it half as far.
    assert found[0].relative_drift > found[1].relative_drift
    broken = found[-1].distances
    assert broken[-1] > 1.5 * max(broken[:-1])
    table = symptoms.table_of([replace(symptoms.HEALTHY, name="a name")], found[:1])
    assert table.splitlines()[2].startswith("| a name |")
