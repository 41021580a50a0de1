"""The forty-line Pruner of walkthrough.ipynb, section 7: the first half of task 4 of the assignment."""

from types import SimpleNamespace

import pytest
import torch
from assignment import small_pruner
from torch import nn

from test_luvc import LAYERS, close, keep_last, random, reference, same, tiny

if not hasattr(reference, "SmallPruner"):  # a student's file has it
    exec(compile(small_pruner(), "walkthrough.ipynb", "exec"), vars(reference))


class AddsHundred(nn.Module):
    """A "layer" that remembers what it got."""

    def forward(self, hidden, **kwargs):
        self.got, self.before = {**kwargs, "hidden": hidden}, hidden.clone()
        return hidden + 100


def test_small_pruner_by_hand(monkeypatch):
    """On t v v t v v v t, two of text around and one between; the last image tokens stay. Catches: shares of what is
    left, halves rounded to even, text that is pruned or moved, positions renumbered, a mask or position ids left in,
    outputs in the wrong rows, an input that is written to, hooks left in."""
    asked, S, place = [], 8, [1, 2, 4, 5, 6]
    is_image = torch.zeros(S, dtype=torch.bool)
    is_image[place] = True

    def choose(x, keep):
        asked.append((x[0, :, 0].tolist(), keep))
        return keep_last(x, keep)

    monkeypatch.setattr(reference, "spectral_prune", choose)
    decoder = SimpleNamespace(layers=[AddsHundred() for _ in range(5)])
    pruner = reference.SmallPruner(decoder, is_image, [1.0, 0.7, 0.5, 0.1, 0.0])  # 5, 3.5, 2.5, 0.5, 0
    table = torch.arange(float(S)).view(1, S, 1)
    more = {"position_embeddings": (table, -table), "attention_mask": torch.ones(1), "position_ids": table}
    hidden, kept = table.clone(), [list(range(8)), [0, 2, 3, 4, 5, 6, 7], [0, 3, 4, 5, 6, 7]]
    kept += [[0, 3, 6, 7], [0, 3, 7]]
    for number, layer in enumerate(decoder.layers):
        whole, before = hidden, hidden.clone()
        hidden = layer(whole, **more)
        at = f"layer {number}"
        assert torch.equal(whole, before), f"{at}: its input was written to; it is the caller's"
        same(pruner.kept[number].tolist(), kept[number], f"{at}: `kept`")
        same(layer.before[0, :, 0].tolist(), before[0, kept[number], 0].tolist(), f"{at}: rows that it got")
        rotary = [t[0, :, 0].tolist() for t in layer.got["position_embeddings"]]
        same(rotary, [kept[number], [-k for k in kept[number]]], f"{at}: rotary positions, of the prompt")
        same([layer.got["attention_mask"], layer.got["position_ids"]], [None, None], f"{at}: mask, ids")
        want = before[0, :, 0] + torch.tensor([100.0 * (row in kept[number]) for row in range(S)])
        same(hidden[0, :, 0].tolist(), want.tolist(), f"{at}: the whole sequence behind it")
    want = [([1, 2, 4, 5, 6], 4), ([2, 4, 5, 6], 3), ([4, 5, 6], 1), ([6], 0)]
    asked = [([token % 100 for token in tokens], keep) for tokens, keep in asked]
    same(asked, want, "what spectral_prune was asked: (tokens, keep) each time")
    pruner.remove()
    same(decoder.layers[4](table, **more).shape[1], S, "after remove() a layer processes")


@torch.no_grad()
@pytest.mark.parametrize("fractions", [[1.0] * LAYERS, [0.8, 0.6, 0.3, 0.0], [0.5, 0.5, 0.5, 0.5]])
def test_small_pruner_equals_a_masked_model(fractions):
    """What is kept sees what it would see if nothing were removed and the rest were masked."""
    decoder, S = tiny().get_decoder(), 24
    is_image = torch.arange(S).remainder(8) > 1
    embeds = random(1, 1, S, 32) / 4
    pruner = reference.SmallPruner(decoder, is_image, fractions)
    got = decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
    pruner.remove()

    def masked(number):
        present = torch.zeros(S, dtype=torch.bool).index_fill(0, pruner.kept[number], True)
        mask = torch.ones(S, S, dtype=torch.bool).tril() & present | torch.eye(S, dtype=torch.bool)
        return lambda layer, args, kwargs: (args, kwargs | {"attention_mask": mask[None, None]})

    for number, layer in enumerate(decoder.layers):
        layer.register_forward_pre_hook(masked(number), with_kwargs=True)
    want = decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
    last = pruner.kept[-1]
    assert set((~is_image).nonzero()[:, 0].tolist()) <= set(last.tolist()), "text was pruned"
    same(int(is_image[last].sum()), int(fractions[-1] * 18 + 0.5), "image tokens at the last layer")
    close(got[:, last], want[:, last], 1e-5, "another result than with masks")
