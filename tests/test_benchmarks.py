import io
import json
import sys

import cifar
import criteria
import pyarrow
import pyarrow.parquet
import pytest
import reference
import torch
import train_reference
from PIL import Image

TRAIN, TEST = 24, 40


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(folder, split, images, labels):
    folder.mkdir(exist_ok=True)
    rows = [{"bytes": png(image), "path": None} for image in images]
    table = pyarrow.table({"img": rows, "label": labels.tolist()})
    pyarrow.parquet.write_table(table, folder / f"{split}.parquet")


def write_folders(folder, split, images, labels):
    for label in range(cifar.CLASSES):
        (folder / split / str(label)).mkdir(parents=True)
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        (folder / split / str(label) / f"{i:03}.png").write_bytes(png(image))


WRITERS = {"parquet": write_parquet, "folders": write_folders}


def random_images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (count, 3, 2, 2), dtype=torch.uint8, generator=generator)
    return blocks.repeat_interleave(16, 2).repeat_interleave(16, 3)


def random_labels(count, seed):
    return torch.randint(10, (count,), generator=torch.Generator().manual_seed(seed))


def random_reference(name):
    """A reference model whose classes depend on the image and on every MLP."""
    torch.manual_seed(0)
    model = reference.build_reference(name).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "mlp" in parameter_name or "head" in parameter_name:
                parameter.normal_(std=0.05)
    return model


def masked_predictions(model, images):
    """Classes with half of every MLP's hidden activations zeroed, by L2 magnitude."""
    handles = []
    for module in model.modules():
        if not hasattr(module, "fc2"):
            continue
        score = module.fc1.weight.square().sum(1) + module.fc2.weight.square().sum(0)
        mask = score >= score.median()
        mask[score.argsort()[: len(score) // 2]] = False
        handles.append(module.fc2.register_forward_pre_hook(lambda _, x, m=mask: x[0] * m))
    with torch.no_grad():
        classes = model(cifar.normalize(images)).argmax(-1)
    for handle in handles:
        handle.remove()
    return classes


@pytest.mark.parametrize("layout", WRITERS)
def test_load_split_reads_both_layouts(layout, tmp_path):
    images, labels = random_images(12, 0), random_labels(12, 0).sort().values
    WRITERS[layout](tmp_path, "test", images, labels)
    read_images, read_labels = cifar.load_split(tmp_path, "test")
    assert torch.equal(read_labels, labels)
    assert torch.equal(read_images, images)


def test_load_split_tells_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="pass the folder that does with --data"):
        cifar.load_split(tmp_path, "test")


@pytest.mark.parametrize(("name", "layout"), [("vit", "parquet"), ("swin", "folders")])
def test_criteria(name, layout, tmp_path, capsys):
    model = random_reference(name)
    reference.save_reference(model, name, {}, tmp_path)
    images = random_images(TEST, 1)
    expected = masked_predictions(model, images)
    dense = model(cifar.normalize(images)).argmax(-1)
    assert (expected == dense).float().mean() < 0.95
    WRITERS[layout](tmp_path / "data", "train", random_images(TRAIN, 2), random_labels(TRAIN, 2))
    WRITERS[layout](tmp_path / "data", "test", images, expected)

    options = "--fractions 0.5 --seeds 0 1 --images 8 --search-images 4 --hessian-images 2"
    options += " --max-increase 0.1 --compare-at 0.1 --test-images 0 --device cpu"
    paths = ["--data", tmp_path / "data", "--checkpoints", tmp_path, "--output", tmp_path / "out"]
    criteria.main(["--model", name, *options.split(), *map(str, paths)])

    record = json.loads((tmp_path / "out" / f"criteria_{name}.json").read_text())
    assert record["dense"]["accuracy"] == pytest.approx((expected == dense).float().mean().item())
    curves = {n: c["accuracy"]["0.5"] for n, c in record["equal_widths"]["criteria"].items()}
    assert curves["Magnitude L2"] == [1.0]
    assert curves["LAMP"] == [1.0]
    assert len(curves["EntropyTaylor, prediction"]) == 2
    assert max(curves["Random"]) < 1
    size = record["equal_widths"]["sizes"]["0.5"]
    assert size["kept"] == pytest.approx(0.5, abs=0.01)
    assert size["macs"] < record["dense"]["macs"]
    for run in record["searched_widths"]["0.1"]:
        at = run["criteria"]["EntropyTaylor, prediction"]["searched widths"]
        assert at == run["accuracy"]
    assert (tmp_path / "out" / f"criteria_{name}.png").stat().st_size > 0
    assert "±" in capsys.readouterr().out


def test_criteria_leave_the_model_as_it_was():
    model = random_reference("vit")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, labels = random_images(4, 0), random_labels(4, 0)
    bench = criteria.Bench(model, cifar.normalize(images), labels)
    orders = {
        name: bench.rank(criterion, [(cifar.normalize(images), labels)], 0)
        for name, criterion in criteria.all_criteria(2).items()
    }
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(hasattr(module, "_importance") for module in model.modules())
    for order in orders.values():
        assert all(sorted(channels) == list(range(512)) for channels in order.values())
    assert orders["LAMP"] == orders["Magnitude L2"] != orders["Magnitude L1"]


def test_hessian_of_all_images_is_the_mean_of_squared_gradients():
    model = random_reference("vit")
    images, labels = cifar.normalize(random_images(3, 0)), random_labels(3, 0)
    layer = model.blocks[2].mlp.fc2
    squares = torch.zeros_like(layer.weight)
    for i in range(3):
        loss = torch.nn.functional.cross_entropy(model(images[i : i + 1]), labels[i : i + 1])
        squares += torch.autograd.grad(loss, layer.weight)[0].square() / 3
    kind = criteria.HessianOfAllImages
    importance = criteria.collect_hessian(kind, 3, model, [(images, labels)])
    found = importance._accu_grad[layer.weight] / importance._counter[layer.weight]
    torch.testing.assert_close(found, squares)


def test_training_resumed_equals_training_at_one_go(tmp_path, monkeypatch):
    for split, seed in (("train", 0), ("test", 1)):
        write_parquet(tmp_path, split, random_images(16, seed), random_labels(16, seed))

    def train(output):
        arguments = "train_reference.py --model vit --epochs 2 --batch-size 8 --threads 1 --device"
        paths = ["cpu", "--data", str(tmp_path), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", [*arguments.split(), *paths])
        train_reference.main()
        return reference.load_reference("vit", output).state_dict()

    whole = train(tmp_path / "whole")

    def stop_in_second(*arguments):
        if arguments[3] == 1:
            raise KeyboardInterrupt
        return train_epoch(*arguments)

    train_epoch = train_reference.train_epoch
    monkeypatch.setattr(train_reference, "train_epoch", stop_in_second)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "resumed")
    monkeypatch.setattr(train_reference, "train_epoch", train_epoch)
    torch.manual_seed(99)
    resumed = train(tmp_path / "resumed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
