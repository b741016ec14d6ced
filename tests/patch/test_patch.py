"""Replacing attributes and putting them back."""

import copy

import pytest
from torch import nn

from sfllava_fast.errors import PatchError
from sfllava_fast.patch import Patch, undo


class Base:
    def tokens(self):
        return "inherited"

    @staticmethod
    def count():
        return 1


class Model(Base):
    pass


def replaced(self=None):
    return "replaced"


def held(owner):
    return dict(vars(owner))


@pytest.mark.parametrize("name", ["tokens", "count", "new"])
@pytest.mark.parametrize("target", [Base, Model, Model(), nn.Linear(2, 2)], ids=["base", "class", "instance", "module"])
def test_undo_restores_the_exact_attributes(name, target):
    before = held(target)
    patch = Patch(target, [(target, name, replaced)])
    assert vars(target)[name] is replaced
    patch.undo()
    assert held(target) == before and list(vars(target)) == list(before)
    patch.undo()  # nothing more to do
    assert held(target) == before


def test_a_staticmethod_comes_back_as_one():
    raw = vars(Base)["count"]
    with Patch(Base, [(Base, "count", replaced)]):
        assert Model.count() == "replaced"
    assert vars(Base)["count"] is raw and Base().count() == 1


def test_submodules_keep_their_place():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    first = model[0]
    with Patch(model, [(model, "0", nn.Identity())]):
        assert isinstance(model[0], nn.Identity) and not model.state_dict()
    assert model[0] is first and list(model._modules) == ["0", "1"]


def test_all_or_nothing():
    class Slotted:
        __slots__ = ()

    model = Model()
    with pytest.raises((AttributeError, TypeError)):
        Patch(model, [(model, "tokens", replaced), (Slotted(), "tokens", replaced)])
    assert not vars(model)


def test_patched_again_is_patched_once():
    model = Model()
    Patch(model, [(model, "tokens", replaced), (model, "count", replaced)])
    patch = Patch(model, [(model, "tokens", replaced)])
    assert "count" not in vars(model)
    patch.undo()
    assert not vars(model)


def test_undo_without_the_patch():
    model = Model()
    undo(model)
    Patch(model, [(model, "tokens", replaced)])
    undo(model)
    assert not vars(model) and model.tokens() == "inherited"


def test_an_instance_does_not_undo_its_class():
    with Patch(Model, [(Model, "tokens", replaced)]):
        undo(Model())
        assert Model().tokens() == "replaced"


def test_what_others_replaced_since_is_not_lost():
    model = Model()
    patch = Patch(model, [(model, "count", replaced), (model, "tokens", replaced)])
    model.tokens = other = lambda: "other"
    with pytest.raises(PatchError, match="Model.tokens was replaced again"):
        patch.undo()
    assert model.tokens is other and vars(model)["count"] is replaced
    model.tokens = replaced
    patch.undo()
    assert not vars(model)


def test_a_copy_can_be_undone_alone():
    model = nn.Linear(2, 2)
    Patch(model, [(model, "extra", replaced)])
    twin = copy.deepcopy(model)
    undo(twin)
    assert not hasattr(twin, "extra") and model.extra is replaced
