"""The methods that stamp inverted triggers: pairwise, universal, and NC."""

import jax
import numpy as np
import pytest

from moth_jax.hardening.baselines import nc, universal
from moth_jax.hardening.baselines.stages import draw
from moth_jax.hardening.scheduler import sweep_pair
from moth_jax.inversion import Budget, NeuralCleanse
from tests.helpers.hardenings import (
    CLASSIFIER,
    DATASET,
    VARIABLES,
    K,
    config_of,
    equal,
    recorded_calls,
    run,
    whole,
)


class Stamping:
    """What a method gave its inversions and its updates in a run, `rounds` of it."""

    def __init__(self, monkeypatch, name, **options):
        module = {"universal": universal, "nc": nc}[name]
        self.inversions = recorded_calls(monkeypatch, module, "make_universal_inversion")
        self.updates = recorded_calls(monkeypatch, module, "make_stamped_update")
        self.config = config_of(name, **options)
        self.final, self.rounds = run(name, **options)

    @property
    def batches(self):
        """(labels, triggers, which are stamped), of each step; the images are the clean ones."""
        for index, update in enumerate(self.updates):
            _, images, labels, trigger, stamped, _ = update.args
            clean = draw(DATASET, self.config, index)
            np.testing.assert_array_equal(images, clean.images)
            np.testing.assert_array_equal(labels, clean.labels)
            yield labels, trigger, stamped


def never(target):
    """Variables of a model that takes nothing for `target`."""
    rows = VARIABLES["params"]["rows"].at[:, target].set(-1000.0)
    return {**VARIABLES, "params": {**VARIABLES["params"], "rows": rows}}


def test_pairwise_has_no_warm_up_and_takes_every_pair_for_a_round_before_any_twice():
    _, rounds = run("pairwise", steps_per_round=2, max_steps=12)
    assert {record["phase"] for record in rounds.records} == {"hardening"}
    pairs = [record["directions"][0] for record in rounds.records]
    assert pairs[::2] == pairs[1::2]
    turns = [sweep_pair(K, turn, config_of("pairwise").seed) for turn in range(6)]
    assert pairs[::2] == [[DATASET.class_names[k] for k in pair] for pair in turns]
    assert len(set(turns[:3])) == len(set(turns[3:])) == 3
    turns = [sweep_pair(5, turn, seed=1) for turn in range(20)]
    every = [(a, b) for a in range(5) for b in range(a + 1, 5)]
    assert sorted(turns[:10]) == sorted(turns[10:]) == every
    assert turns[:10] != turns[10:]


def test_universal_takes_every_target_in_turn_and_goes_on_from_its_triggers():
    final, rounds = run("universal", steps_per_round=2, max_steps=6)
    targets = [record["target"] for record in rounds.records]
    assert targets[::2] == targets[1::2]
    assert set(targets) == set(DATASET.class_names)
    assert final.memory["mask"].shape == (K, 4, 4, 1)
    before, after = (rounds[i][0].memory["mask"] for i in (0, 1))
    position = DATASET.class_names.index(targets[0])
    others = [k for k in range(K) if k != position]
    np.testing.assert_array_equal(before[np.array(others)], after[np.array(others)])


def test_universal_stamps_its_share_of_the_classes_other_than_the_target(monkeypatch):
    done = Stamping(monkeypatch, "universal", stamp_share=0.5, max_trigger_share=1.0, max_steps=12)
    share = []
    for (labels, trigger, stamped), inversion, record in zip(
        done.batches, done.inversions, done.rounds.records, strict=True
    ):
        target = DATASET.class_names.index(record["target"])
        assert inversion.args[2] == target
        assert set(inversion.args[1].victims) == set(range(K)) - {target}
        assert not stamped[labels == target].any()
        assert stamped.sum() == record["num_stamped"]
        found = np.isfinite(record["size"])
        share += list(stamped[labels != target]) if found else []
        assert found or not stamped.any()
        for mine, inverted in ((trigger.mask, "mask"), (trigger.pattern, "pattern")):
            expected = getattr(inversion.result.trigger, inverted)
            np.testing.assert_array_equal(mine, np.broadcast_to(expected, mine.shape))
    assert len(share) > 60
    assert 0.4 < np.mean(share) < 0.6


def test_universal_stamps_no_trigger_above_the_limit(monkeypatch):
    _, rounds = whole("universal")
    limit = np.median([record["size"] for record in rounds.records])
    options = {"max_trigger_share": float(limit) / np.prod(DATASET.image_shape), "stamp_share": 0.9}
    done = Stamping(monkeypatch, "universal", **options)
    stamped = [stamped.any() for _, _, stamped in done.batches]
    assert stamped == [record["size"] <= limit for record in done.rounds.records]
    assert set(stamped) == {True, False}


@pytest.mark.parametrize("name", ["universal", "nc"])
def test_of_chosen_classes_no_other_is_stamped_or_inverted(name, monkeypatch):
    limit = {"max_trigger_share": 1.0} if name == "universal" else {}
    done = Stamping(monkeypatch, name, classes=(0, 2), stamp_share=1.0, **limit)
    for inversion in done.inversions:
        assert [{0: 2, 2: 0}[int(inversion.args[2])]] == list(inversion.args[1].victims)
    assert not any(stamped[labels == 1].any() for labels, _, stamped in done.batches)
    assert any(stamped.any() for _, _, stamped in done.batches)


def test_universal_goes_on_from_the_targets_last_trigger_with_the_budget_for_that(monkeypatch):
    done = Stamping(monkeypatch, "universal", steps_per_round=3, max_steps=6)
    config, budgets = done.config, []
    for index, inversion in enumerate(done.inversions):
        begins, options = index % 3 == 0, inversion.options
        if index:
            before, target = done.rounds[index - 1][0].memory, inversion.args[2]
            np.testing.assert_array_equal(options["start"].mask[0], before["mask"][target])
            np.testing.assert_array_equal(options["start"].pattern[0], before["pattern"][target])
            begins |= not np.isfinite(done.rounds.records[index - 1]["size"])
        budgets.append((options["budget"].num_steps, options["budget"].mask_weight))
        first = (config.first_steps, config.first_mask_weight)
        assert budgets[-1] == (first if begins else (config.next_steps, config.next_mask_weight))
    assert len(set(budgets)) == 2


def test_nc_inverts_a_trigger_for_every_class_and_stamps_its_share_of_the_others(monkeypatch):
    done = Stamping(monkeypatch, "nc", stamp_share=0.5, max_steps=8)
    memory, used = jax.device_get(done.final.memory), []
    prepared = [record for record in done.rounds.records if record["phase"] == "preparation"]
    assert [record["target"] for record in prepared] == list(DATASET.class_names)
    assert np.isfinite([record["size"] for record in prepared]).all()
    np.testing.assert_allclose(memory["size"], [r["size"] for r in prepared], rtol=1e-6)
    counted = [r["num_stamped"] for r in done.rounds.records if r["phase"] == "hardening"]
    assert counted == [stamped.sum() for _, _, stamped in done.batches]
    for target, inversion in enumerate(done.inversions):
        variables, samples, towards, _ = inversion.args
        equal(variables, VARIABLES)
        assert towards == target
        assert set(samples.victims) == set(range(K)) - {target}
        np.testing.assert_array_equal(inversion.result.trigger.mask[0], memory["mask"][target])
    share = []
    for labels, trigger, stamped in done.batches:
        same = (trigger.mask[:, None] == memory["mask"][None]).all((2, 3, 4))
        same &= (trigger.pattern[:, None] == memory["pattern"][None]).all((2, 3, 4))
        assert (same.sum(1) == 1).all()
        towards = same.argmax(1)
        assert (towards != labels)[stamped].all()
        used += list(towards[stamped])
        share += list(stamped[towards != labels])
    assert set(used) == set(range(K))
    assert 0.4 < np.mean(share) < 0.6


def test_nc_stamps_no_trigger_that_was_not_found(monkeypatch):
    updates = recorded_calls(monkeypatch, nc, "make_stamped_update")
    final, _ = run("nc", stamp_share=1.0, variables=never(1))
    assert np.isinf(final.memory["size"]).tolist() == [False, True, False]
    found = np.asarray(final.memory["mask"])[[0, 2]]
    for update in updates:
        _, _, _, trigger, stamped, _ = update.args
        same = (trigger.mask[stamped][:, None] == found[None]).all((2, 3, 4))
        assert same.any(1).all()
        assert stamped.any()


def test_nc_inverts_with_the_bound_and_the_budget_of_its_options(monkeypatch):
    given, make = [], nc.make_universal_inversion
    monkeypatch.setattr(
        nc, "make_universal_inversion", lambda *args: given.append(args) or make(*args)
    )
    inversions = recorded_calls(monkeypatch, nc, "make_universal_inversion")
    run("nc", mask_weight=0.005, max_steps=1)
    assert given == [(CLASSIFIER, NeuralCleanse(success_bound=0.99, patience=3))]
    assert [call.options for call in inversions] == [{"budget": Budget(60, 0.005, 32)}] * K
