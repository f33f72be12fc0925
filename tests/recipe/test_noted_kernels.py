"""Keys of Axolotl that only say how the same numbers are computed are accepted, and said aloud."""

import pytest
from support.rows import RecipeWriter

from finetuner.recipe import load


@pytest.mark.parametrize("key", ["fused_attn_kernel", "tiled_mlp"])
def test_a_kernel_that_is_not_applied_is_noted_where_it_is_asked_for(write_recipe: RecipeWriter, key: str) -> None:
    (note,) = load(write_recipe(**{key: True})).notes
    assert f"{key} without effect" in str(note).replace(":", "") and not note.quiet
    assert all(note.quiet for note in load(write_recipe(**{key: False})).notes)


def test_gemma_4s_two_attentions_are_one_that_has_both_sizes(write_recipe: RecipeWriter) -> None:
    assert load(write_recipe(gemma4_hybrid_attn_impl=True)).recipe.model.attn_implementation == "sdpa"
    assert load(write_recipe(gemma4_hybrid_attn_impl=False)).recipe.model.attn_implementation == "auto"
