"""The Trainer of transformers with a model of a random, tiny configuration. It reports to the master by itself."""

import tempfile

import torch
from result import say
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

set_seed(0)
config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
tokens = (torch.randint(2, 32, (128, 1)) + torch.arange(12)) % 30 + 2
data = [{"input_ids": row, "labels": row} for row in tokens]
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=data)
    done = trainer.train()
if trainer.is_world_process_zero():
    say(steps=done.global_step, world=arguments.world_size, loss=done.training_loss)
