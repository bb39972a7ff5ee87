"""Hugging Face Trainer: batches are mappings with labels, given to the model by name."""

import tempfile
import warnings

import torch
from digest import print_digest
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

torch.manual_seed(0)
config = BertConfig(
    vocab_size=30,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=8,
    num_labels=3,
)
model = BertForSequenceClassification(config)
examples = [
    {"input_ids": torch.randint(30, (6,)), "labels": torch.randint(3, ()).item()} for _ in range(64)
]
with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
    arguments = TrainingArguments(
        folder,
        num_train_epochs=1,
        per_device_train_batch_size=16,
        report_to=[],
        use_cpu=True,
        seed=1,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples)
    trainer.remove_callback(PrinterCallback)  # It prints how long it took.
    trainer.train()
print_digest(model)
