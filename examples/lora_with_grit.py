# %% [markdown]
# # A fine-tuning notebook, with GRIT in five lines
#
# The usual notebook: a base model, LoRA adapters, TRL's `SFTTrainer`. Then the same with GRIT, on the same rows, and
# the verdict: did it matter, and did it help? It takes a minute or two on two CPU cores; on a GPU, load the model with
# Unsloth's `FastLanguageModel` instead, the rest stays. Open it in Jupyter or an editor that knows `# %%` cells, or
# type `python examples/lora_with_grit.py`.

# %% The notebook as it was: a base model, rows, adapters, arguments
import copy
import logging
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from grit_impl.recipes.bases import resolve_base
from grit_impl.recipes.tasks import find_task

logging.disable(logging.WARNING)
folder = resolve_base("tiny")  # the small base that this project brings along; yours: any folder or hub id
tokenizer = AutoTokenizer.from_pretrained(folder)
rows = find_task("convert").training(480, seed=0)  # yours: questions and answers


def columns(pairs: list[tuple[str, str]]) -> Dataset:
    prompts = [f"### Instruction:\n{question}\n\n### Response:\n" for question, _ in pairs]
    return Dataset.from_dict({"prompt": prompts, "completion": [answer + tokenizer.eos_token for _, answer in pairs]})


training, held_out = columns(rows), columns(find_task("convert").held_out("test"))


def adapters():
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder)
    return get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


arguments = SFTConfig(
    output_dir=tempfile.mkdtemp(),
    max_steps=60,
    per_device_train_batch_size=8,
    per_device_eval_batch_size=16,
    # What tuning found for plain LoRA on this task (docs/measurements/grit-vs-lora.md): the opponent is no straw man.
    learning_rate=7.3e-3,
    adam_beta1=0.8,
    adam_beta2=0.95,
    warmup_steps=5,
    weight_decay=0.01,
    save_strategy="no",
    report_to="none",
    logging_steps=50,
    use_cpu=True,
    disable_tqdm=True,
)

# %% Plain LoRA
lora = SFTTrainer(
    adapters(), copy.copy(arguments), train_dataset=training, eval_dataset=held_out, processing_class=tokenizer
)
lora.train()
plain = lora.evaluate()["eval_loss"]

# %% GRIT: two imports, the subclass, its arguments, and a ledger that writes down what happens to the gradients
from grit_impl import GRITConfig, gradient_ledger, judge, training_arguments, with_grit

model, mine = adapters(), copy.copy(arguments)
vars(mine).update(training_arguments("recommended", base="tiny"))
grit = with_grit(SFTTrainer)(
    model,
    mine,
    train_dataset=training,
    eval_dataset=held_out,
    processing_class=tokenizer,
    grit_config=GRITConfig.preset("recommended"),
)
with gradient_ledger(model) as ledger:
    grit.train()
turned = grit.evaluate()["eval_loss"]

# %% Did it matter?
verdict = judge(ledger)
print(verdict)  # in a notebook, `verdict` alone shows the chain of custody as a table

# %% Did it help? One seed: these two models, not the method.
print(f"held-out loss: LoRA {plain:.3f}, GRIT {turned:.3f} ({100 * (turned / plain - 1):+.1f}%)")

# %% What GRIT did, as it was logged
for row in grit.state.log_history:
    if "loss" in row:
        print(", ".join(f"{name.removeprefix('grit/')} {row[name]:.3g}" for name in row if name.startswith("grit/")))
