"""Rows with labels: which tokens, which number, what is cut, and what is refused."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from node.base import load_base
from node.labelled import arrange, read_labelled
from node.losses import label_logits, mean_loss, measure
from node.records import DataError
from zo.manifest import Task

LABELS = ("bad", "good")
TASK = Task(kind="head", labels=LABELS)
ROWS = ("good\tReturn the absolute value", "bad\tIf", "bad\tthe list is empty, None.")


@pytest.fixture(scope="module")
def base(encoder):
    return load_base(encoder, threads=1, labels=LABELS)


@pytest.fixture
def read(base, tmp_path):
    def read_rows(*rows, length=16):
        file = tmp_path / "rows.tsv"
        file.write_text("label\ttext\n" + "\n".join(rows))
        return read_labelled([file], base.tokenizer, length, TASK, base.padding)

    return read_rows


def test_tokens_are_those_of_the_tokenizer_with_its_marks(base, read):
    rows = read(*ROWS)
    assert rows.labels.tolist() == [1, 0, 0]
    for row, length, text in zip(rows.tokens, rows.lengths, ROWS, strict=True):
        assert row[:length].tolist() == base.tokenizer(text.partition("\t")[2])["input_ids"]
        assert row[0] == base.tokenizer.bos_token_id
        assert set(row[length:].tolist()) <= {base.padding}
    assert str(rows) == f"3 rows (2 bad, 1 good), {rows.lengths.sum()} tokens"
    batch = rows.take(np.array([1]))
    assert batch.tokens.shape == (1, rows.lengths[1]), "a batch is no wider than its longest row"
    assert (rows.num_windows, rows.num_scored) == (3, 3)


def test_long_rows_are_cut_and_counted(base, read):
    whole, cut = read(*ROWS, length=60), read(*ROWS, length=4)
    assert cut.lengths.tolist() == np.minimum(whole.lengths, 4).tolist()
    lost = (whole.lengths - cut.lengths).sum()
    assert str(cut).endswith(f"; 2 rows cut by {lost} tokens to fit 4")
    assert np.array_equal(cut.tokens[:, :2], whole.tokens[:, :2])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["good\tx", "fine\ty"], r"line 3: the label 'fine' is none of this run's, which are 'bad', 'good'"),
        (["good\tx", "bad\t "], r"line 3: the text is empty; remove the row"),
    ],
)
def test_rows_that_cannot_be_used_are_named(read, rows, words):
    with pytest.raises(DataError, match=words):
        read(*rows)


def test_loss_and_accuracy_are_the_librarys_whatever_is_padded(base, read):
    rows = read(*ROWS)
    losses, hits = [], []
    for i, length in enumerate(rows.lengths):
        with torch.inference_mode():
            logits = base.model(
                input_ids=torch.tensor(rows.tokens[i : i + 1, :length].astype(np.int64))
            ).logits
        losses.append(float(cross_entropy(logits, torch.tensor(rows.labels[i : i + 1]))))
        hits.append(int(logits.argmax()) == rows.labels[i])
    batch = rows.take(np.arange(3))
    assert mean_loss(base.model, batch) == pytest.approx(np.mean(losses), rel=1e-5)
    for batch_size in (1, 2, 3):
        found = measure(base.model, rows, batch_size=batch_size)
        assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
        assert found.accuracy == np.mean(hits)
    other = np.where(np.arange(batch.tokens.shape[1]) >= batch.lengths[:, None], 77, batch.tokens)
    assert not np.array_equal(other, batch.tokens)
    changed = label_logits(base.model, batch._replace(tokens=other))
    assert torch.equal(changed, label_logits(base.model, batch))


def test_one_text_is_a_row_of_its_own(base, read):
    alone = arrange(["Return the absolute value"], [1], base.tokenizer, 16, TASK, base.padding)
    assert np.array_equal(alone.tokens[0], read(ROWS[0]).tokens[0])
