# SPDX-License-Identifier: MIT
"""LeNet-5 and ResNet: sizes and FLOPs as published, first loss near ln(K), draws by name, statistics that are kept."""

import math

import pytest
import torch
from torch import nn

from ablab import build, check, config, kconf
from ablab.model.lenet5 import Lenet5Network
from ablab.prune import prunable
from ablab.prune._masked import Masked

IMAGENET = "CONFIG_MODEL_RESNET_DEPTH_50=y\nCONFIG_MODEL_RESNET_STEM_IMAGENET=y\n"
NETS = {
    "lenet5": ("CONFIG_MODEL_LENET5=y\n", 10),
    "resnet18": ("CONFIG_MODEL_RESNET=y\n", 10),
    "resnet50": (f"CONFIG_MODEL_RESNET=y\n{IMAGENET}", 100),
}


def values(text):
    return kconf.settle(kconf.load(), [kconf.parse("test", enumerate(text.splitlines(), 1), "test")]).values


def network(name, extra="", seed=1):
    text, classes = NETS[name]
    (model,) = config.create("MODEL", values(text + extra))
    return model.build((), (), seed, classes)


@pytest.mark.parametrize(
    ("name", "params", "decay", "plain", "weights"),
    [
        ("lenet5", 61_750, 61_470, 280, 5),
        ("resnet18", 11_173_962, 11_164_352, 9_610, 21),
        ("resnet50", 23_712_932, 23_659_712, 53_220, 54),
    ],
)
def test_sizes_groups_and_prunable_tensors_are_the_published_ones(name, params, decay, plain, weights):
    with torch.device("meta"):
        net = network(name)
    assert sum(p.numel() for p in net.parameters()) == params
    assert build.sizes(build.split(net, 0.1, False)) == {"decay": decay, "plain": plain}
    found = prunable(net, False)
    assert len(found) == weights and sum(p.numel() for p in found.values()) == decay
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert all((m.bias is None) == (name != "lenet5") for m in convs)


@pytest.mark.parametrize(("name", "side", "macs"), [("lenet5", 32, 416_520), ("resnet50", 224, 4_087_341_056)])
def test_flops_are_six_for_each_multiply_add(name, side, macs):
    with torch.device("meta"):
        net = network(name)
    assert net.flops_per_token(side) == 6 * macs  # ResNet-50: 4.09 G with 1000 classes, less 900 x 2048


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [True, False])
def test_the_first_loss_is_near_that_of_a_guess(name, training):
    net = network(name, "CONFIG_MODEL_RESNET_WIDTH=16\n" if name != "lenet5" else "").train(training)
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(8, net.channels, 32, 32, generator=stream)
    out = net(x, torch.arange(8))
    assert abs(out.loss.item() - math.log(NETS[name][1])) < 0.8
    assert out.n == 8 and out.logits is None and out.hits.dtype == torch.int64


def test_hits_are_the_likeliest_class():
    net = network("lenet5").eval()
    x = torch.randn(16, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    likeliest = net(x).logits.argmax(1)
    wrong = (likeliest + (torch.arange(16) < 5)) % 10
    assert int(net(x, likeliest).hits) == 16 and int(net(x, wrong).hits) == 11


def test_tensors_are_drawn_by_name_whatever_else_the_model_holds():
    cifar, imagenet = network("resnet18"), network("resnet18", "CONFIG_MODEL_RESNET_STEM_IMAGENET=y\n")
    a, b = cifar.state_dict(), imagenet.state_dict()
    assert {n for n in a if not torch.equal(a[n], b[n]) if a[n].shape == b[n].shape} == set()
    assert {n for n in a if a[n].shape != b[n].shape} == {"stem.weight"}
    other = network("resnet18", seed=2).state_dict()
    assert not torch.equal(a["stem.weight"], other["stem.weight"])
    for conv in (m for m in cifar.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 20_000):
        assert conv.weight.std().item() == pytest.approx((2 / conv.weight[0].numel()) ** 0.5, rel=0.02)


def test_grey_images_are_three_equal_channels():
    net = network("resnet18", "CONFIG_MODEL_RESNET_WIDTH=8\n").eval()
    grey = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(net(grey).logits, net(grey.repeat(1, 3, 1, 1)).logits)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("CONFIG_DATA_CIFAR10=y\n", "CONFIG_DATA_CIFAR10=y: stayed n"),
        ("CONFIG_MODEL_LENET5=y\nCONFIG_DATA_SHAKESPEARE=y\n", "CONFIG_DATA_SHAKESPEARE=y: stayed n"),
        ("CONFIG_MODEL_LENET5=y\nCONFIG_DATA_CIFAR10=y\n", "CONFIG_DATA_CIFAR10=y: stayed n"),
        ("CONFIG_MODEL_LENET5=y\nCONFIG_ATTN_RACT=y\n", "CONFIG_ATTN_RACT=y: stayed n"),
        ("CONFIG_MODEL_RESNET=y\nCONFIG_EVAL_TOKENS=0\n", "CONFIG_EVAL_TOKENS=0: stayed"),
        ("CONFIG_EVAL_TEST_EACH_EPOCH=n\n", "CONFIG_EVAL_TEST_EACH_EPOCH=n: stayed"),
    ],
)
def test_what_the_model_has_no_use_for_is_refused(text, says):
    with pytest.raises(kconf.ConfigError, match=says):
        values(text)


def test_no_symbol_of_text_is_visible_for_images_and_none_of_images_for_text():
    text, image = values(""), values("CONFIG_MODEL_RESNET=y\nCONFIG_PRUNE_MAGNITUDE=y\n")
    of_text = (
        "ATTN_",
        "MLP_",
        "MODEL_GPT_",
        "DATA_TOKENIZER",
        "DATA_VAL",
        "EVAL_KVPRUNE",
        "EVAL_TOKENS",
        "SCHED_COUPLING",
    )
    assert not [n for n in image if n.startswith((*of_text, "SYS_ATTEND"))]
    assert not [n for n in text if n.startswith(("MODEL_RESNET_", "DATA_AUGMENT", "DATA_SPLIT", "EVAL_TEST"))]


@pytest.mark.parametrize(
    ("text", "lr", "decay", "clip", "beta2", "warmup"),
    [
        ("", 6e-4, 0.1, 1.0, 0.95, 1000),
        ("CONFIG_MODEL_LENET5=y\n", 1e-3, 1e-4, 0.0, 0.999, 100),
        ("CONFIG_MODEL_RESNET=y\n", 1e-3, 5e-4, 0.0, 0.999, 100),
        ("CONFIG_OPT_SGD=y\n", 0.1, 0.1, 1.0, None, 1000),
        ("CONFIG_MODEL_LENET5=y\nCONFIG_OPT_SGD=y\n", 0.05, 1e-4, 0.0, None, 100),
        ("CONFIG_MODEL_RESNET=y\nCONFIG_OPT_SGD=y\n", 0.1, 5e-4, 0.0, None, 100),
        ("CONFIG_MODEL_RESNET=y\nCONFIG_OPT_ADAM=y\n", 1e-3, 0.0, 0.0, None, 100),
    ],
)
def test_defaults_follow_the_model(text, lr, decay, clip, beta2, warmup):
    v = values(text + "CONFIG_PRUNE_MAGNITUDE=y\n")
    got = [v[n] for n in ("OPT_LR", "OPT_WEIGHT_DECAY", "OPT_CLIP_NORM", "PRUNE_WARMUP")]
    assert got == [lr, decay, clip, warmup] and v.get("OPT_ADAMW_BETA2") == beta2


def checked(text):
    """The dry run of a configuration, with what a plan would have resolved."""
    plain = "CONFIG_SYS_DEVICE_CPU=y\nCONFIG_SYS_COMPILE_OFF=y\nCONFIG_SYS_AMP_OFF=y\nCONFIG_SYS_THREADS=1\n"
    case = check.Case(["a-s1"], "", values(f"{text}{plain}CONFIG_TRAIN_BATCH_MICRO=16\n"), {})
    check.run(case)
    return case


@pytest.mark.parametrize(
    "text",
    [
        "CONFIG_MODEL_LENET5=y\nCONFIG_PRUNE_MOVEMENT=y\n",
        "CONFIG_MODEL_RESNET=y\nCONFIG_OPT_SGD=y\n",
        "CONFIG_MODEL_RESNET=y\nCONFIG_OPT_ADAMWPRUNE=y\nCONFIG_PRUNE_STATE=y\n",
        f"CONFIG_MODEL_RESNET=y\n{IMAGENET}CONFIG_DATA_CIFAR100=y\nCONFIG_DATA_AUGMENT_RESIZE=224\n",
    ],
)
def test_the_dry_run_passes(text):
    case = checked(text)
    assert case.stage == "", f"{case.stage}: {case.reason}"
    assert "causality" not in case.passed and case.passed[-1] == "contracts"


def crowd(self, x):
    return real(self, x - x.mean(0, keepdim=True))


def remembers(self, x):
    if not self.training:
        self.norm1.running_mean += 1e-3
    return real(self, x)


real = Lenet5Network.logits


@pytest.mark.parametrize(
    ("fault", "stage", "says"),
    [
        (crowd, "batch", "depend on the other rows"),
        (remembers, "build", "two forwards of one input differ"),
        (lambda self, x: real(self, x).detach() + self.head.bias, "gradients", "no gradient"),
    ],
)
def test_the_dry_run_sees_a_network_that_is_wrong(monkeypatch, fault, stage, says):
    monkeypatch.setattr(Lenet5Network, "logits", fault)
    case = checked("CONFIG_MODEL_LENET5=y\n")
    assert case.stage == stage and says in case.reason


def test_the_dry_run_sees_convolutions_that_nothing_prunes(monkeypatch):
    monkeypatch.setattr(Masked, "update", lambda self, step, progress: None)
    case = checked("CONFIG_MODEL_LENET5=y\nCONFIG_PRUNE_MAGNITUDE=y\n")
    assert case.stage == "overfit" and "no more zeros in the weights" in case.reason
