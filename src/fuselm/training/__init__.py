"""Train the target on fused distributions.

`target_training` makes a trained model's folder. `trainer` is `transformers.Trainer` with the loss of `objective`, and
`batches` says what a step reads. `trainable` makes a model's forward compute the loss; `averaging` and `adapters`
change what is trained; `needs` and `reload` check before and after.
"""
