import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset
from toys import images, toy

import tp_amp
from tp_amp.running.batches import stream


class Numbered(Dataset):
    """Dataset whose images hold their own index."""

    def __len__(self) -> int:
        return 25

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, 2, 2), float(index)), index % 3


def seen(batches) -> list[int]:
    return [int(image[0, 0, 0]) for batch in batches for image in batch[0]]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_split_of_a_loader_has_no_image_in_common(shuffle: bool, share: float) -> None:
    loader = DataLoader(Numbered(), batch_size=4, shuffle=shuffle)
    scoring, search = tp_amp.split_batches(loader, share)
    first, second = seen(scoring), seen(search)
    assert sorted(first + second) == list(range(25))
    assert len(second) == round(25 * share)
    # The parts stay apart and in order however often they are read.
    assert seen(scoring) == first
    assert seen(search) == second


def test_split_depends_on_the_seed_alone() -> None:
    loader = DataLoader(Numbered(), batch_size=4, shuffle=True)
    first = seen(tp_amp.split_batches(loader, seed=1)[0])
    torch.manual_seed(123)
    assert seen(tp_amp.split_batches(loader, seed=1)[0]) == first
    assert seen(tp_amp.split_batches(loader, seed=2)[0]) != first


def test_split_keeps_batch_size_and_collate() -> None:
    loader = DataLoader(Numbered(), batch_size=4, collate_fn=lambda items: [items[0][0][None], 0])
    scoring, _ = tp_amp.split_batches(loader)
    assert scoring.batch_size == 4
    assert next(iter(scoring))[0].shape == (1, 1, 2, 2)


def test_split_of_a_list_is_between_batches() -> None:
    parts = images(10).split(2)
    scoring, search = tp_amp.split_batches(iter(parts), 0.4)
    assert [len(scoring), len(search)] == [3, 2]
    assert torch.equal(torch.cat(list(search) + list(scoring)), torch.cat(parts))


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, 2.0])
def test_bad_share_raises(share: float) -> None:
    with pytest.raises(ValueError, match="calibration must be a share between 0 and 1"):
        tp_amp.split_batches([images()], share)


def test_too_little_to_split_raises() -> None:
    with pytest.raises(ValueError, match="1 batches can't be split"):
        tp_amp.split_batches([images()])
    with pytest.raises(ValueError, match="1 images can't be split"):
        tp_amp.split_batches(DataLoader(TensorDataset(images(1))))


def test_stream_reads_an_iterable_once() -> None:
    starts = []

    class Batches:
        def __iter__(self):
            starts.append(1)
            return iter(images(4).split(2))

    assert len(list(stream(Batches(), toy(), description="", progress=True))) == 2
    assert len(starts) == 1


def test_images_are_picked_by_key_or_function() -> None:
    model, x, y = toy(), images(6), torch.arange(6) % 5
    loader = [{"img": x, "target": y, "path": ["a"] * 6}]
    plain = tp_amp.EntropyTaylorImportance().collect(model, [x]).scores
    for key in ("img", lambda batch: (batch["img"], batch["target"])):
        picked = tp_amp.pick_inputs(loader, key)
        assert len(picked) == 1  # type: ignore[arg-type]
        found = tp_amp.EntropyTaylorImportance().collect(model, picked).scores
        assert all(torch.equal(scores, plain[name]) for name, scores in found.items())
        assert tp_amp.measure(model, picked, repeats=1).labelled_images == 6


def test_a_key_that_is_not_there_is_told_with_those_that_are() -> None:
    model, x = toy(), images(2)
    loader = [{"img": x, "path": ["a", "b"]}]
    with pytest.raises(ValueError, match=r"no key 'image'; its keys are \['img', 'path'\]"):
        list(tp_amp.pick_inputs(loader, "image"))
    with pytest.raises(TypeError, match="a batch is a Tensor, not a dict with the key 'img'"):
        list(tp_amp.pick_inputs([x], "img"))
    with pytest.raises(ValueError, match=r"the keys \['img', 'path'\].*pick_inputs"):
        tp_amp.EntropyTaylorImportance().collect(model, loader)
    with pytest.raises(TypeError, match=r"under the keys \['path'\].*pick_inputs"):
        tp_amp.EntropyTaylorImportance().collect(model, [{"path": ["a"]}])
    with pytest.raises(TypeError, match="an iterable of batches"):
        tp_amp.pick_inputs(x, "img")
