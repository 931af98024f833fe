"""fuse_head() in models of transformers, where it is installed: the usual losses and gradients, and no logits."""

import copy
import warnings

import pytest
from helpers_torch import ours, torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {
    "vocab_size": 97, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {"vocab_size": 97, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}
BLOOM = {
    "vocab_size": 97,
    "hidden_size": 16,
    "n_layer": 2,
    "n_head": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGURATIONS = {
    "Llama": SMALL, "Qwen3": SMALL | {"head_dim": 8}, "Mistral": SMALL, "Gemma2": SMALL | {"head_dim": 8}, "GPT2": GPT2,
    "GPTNeoX": SMALL, "Olmo2": SMALL, "Granite": SMALL | {"logits_scaling": 4.0}, "Cohere": SMALL, "Bloom": BLOOM, "Phi": SMALL,
}  # fmt: skip


def models(name, dtype=torch.float32):
    """A model, and its copy with a fused head."""
    torch.manual_seed(0)
    configuration = getattr(transformers, f"{name}Config")(**CONFIGURATIONS[name])
    plain = transformers.AutoModelForCausalLM.from_config(configuration).to(dtype).train()
    for module in plain.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return plain, copy.deepcopy(plain)


def tokens():
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, 97, (2, 12), generator=generator)
    labels = words.clone()
    labels[0, :4] = -100
    return words, labels


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": torch.tensor(17)}], ids=["mean", "num_items_in_batch"])
def test_a_training_step_is_the_usual_one_without_logits(name, options):
    plain, other = models(name)
    handle = ours.fuse_head(other)
    words, labels = tokens()
    found = []
    for model in (plain, other):
        loss = model(input_ids=words, labels=labels, **options).loss
        loss.backward()
        found.append(loss.detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    for one, another in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(another.grad, one.grad, rtol=1e-4, atol=2e-6)
    assert handle.fused == 1
    assert not handle.made, handle


def test_bfloat16_has_a_loss_in_float32():
    plain, other = models("Llama", torch.bfloat16)
    ours.fuse_head(other)
    words, labels = tokens()
    losses = [model(input_ids=words, labels=labels).loss for model in (plain, other)]
    assert losses[0].dtype is losses[1].dtype is torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0)


def test_evaluation_and_generation_are_untouched():
    plain, other = models("Llama")
    handle = ours.fuse_head(other)
    words, labels = tokens()
    for model in (plain, other):
        model.eval()
    with torch.no_grad():
        results = [model(input_ids=words, labels=labels) for model in (plain, other)]
    assert torch.equal(results[0].logits, results[1].logits)
    generated = [model.generate(words, max_new_tokens=5, do_sample=False) for model in (plain, other)]
    assert torch.equal(*generated)
    assert not handle.fused
    assert not handle.made


@pytest.mark.parametrize("arguments", [{}, {"bf16": True}, {"label_smoothing_factor": 0.1}, {"gradient_checkpointing": True}])
def test_the_trainer_with_accumulation(arguments, tmp_path):
    pytest.importorskip("accelerate")
    curves = []
    for fused in (False, True):
        model = models("Llama")[0]
        handle = ours.fuse_head(model) if fused else None
        words, labels = tokens()
        data = [{"input_ids": words[k % 2], "labels": labels[k % 2]} for k in range(8)]
        settings = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=1, gradient_accumulation_steps=2,
            logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, learning_rate=1e-2, **arguments,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=settings, train_dataset=data)
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(curves[0]) == 3
    assert curves[1] == pytest.approx(curves[0], rel=2e-2 if "bf16" in arguments else 2e-4)
    if "label_smoothing_factor" in arguments:  # transformers computes that loss from log_softmax
        assert handle.made, handle
    else:
        assert handle.fused == 6, handle
