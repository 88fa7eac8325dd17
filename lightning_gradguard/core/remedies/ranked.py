"""Remedies of symptoms, in the form of `texts`: one text for each remedy, the likeliest first."""

REMEDIES = {
    "exploding_gradient": (
        "[clipping|Clip gradients: AdaptiveGradientClipping(), or gradient_clip_val=1.0 of the Trainer.]",
        "Lower the learning rate, or warm it up for longer.",
        "Fit the initialization: Xavier before tanh, He before ReLU"
        "[feed_forward|, orthogonal for recurrent weights]"
        "[check|; InitializationCheck() measures it before step 1].",
        "Bound the weights: weight_decay, or a max-norm constraint.",
        "[feed_forward|In a recurrent network use gated cells (LSTM or GRU), and truncated BPTT.]",
    ),
    "vanishing_gradient": (
        "[no_attention|In a transformer normalize ahead of each layer (norm_first=True), and warm the "
        "learning rate up.]",
        "Use He initialization (torch.nn.init.kaiming_normal_) with ReLU or GELU, in place of activations "
        "that saturate (tanh, sigmoid)[check|; InitializationCheck() measures it before step 1].",
        "[residual|Add residual connections.]",
        "[normalized|Add batch or layer normalization.]",
        "[feed_forward|In a recurrent network use gated cells (LSTM or GRU), or an orthogonal recurrent "
        "weight.]",
        "As a last resort train layer by layer.",
    ),
    "nonfinite_loss": (
        "[rollback|Add NaNRollback(): it skips such batches, and names the cause, rows and line of code.]",
        "Check the batch of that step for nonfinite or huge inputs and bad labels.",
        "Compute the loss in float32 and on logits: cross_entropy rather than log of softmax.",
    ),
    "nonfinite_gradient": (
        "[rollback|Add NaNRollback(): it skips such steps, and names the cause, rows and line of code.]",
        "Look for log(0), division by zero, or sqrt and norm at 0 before {where}.",
        "Lower the learning rate if it repeats[clipping|, and clip gradients (AdaptiveGradientClipping)].",
    ),
    "divergence": (
        "Lower the learning rate, or warm it up for longer.",
        "[clipping|Clip gradients: AdaptiveGradientClipping(), or gradient_clip_val=1.0 of the Trainer.]",
        "[check|Check the initialization: InitializationCheck() measures it before step 1.]",
        "[rollback|Roll back automatically: NaNRollback() with LearningRateBackoff().]",
    ),
    "stuck_loss": (
        "Try the learning rate 10 times higher, and 10 times lower; lightning-gradguard treat tries rates "
        "and other changes by itself.",
        "Change saturating activations for ReLU or GELU[check|, and check the initialization "
        "(InitializationCheck)].",
        "Check that labels match their inputs: can the network learn one batch alone, "
        "Trainer(overfit_batches=1)?",
    ),
    "little_learned": (
        "Check that labels match their inputs, also where a view or reshape stands for a transpose: can the "
        "network learn one batch by heart?",
        "Train for longer, where the loss still falls, or raise the learning rate 3 to 10 times.",
    ),
    "large_norm": (
        "Look for a sum where the loss needs a mean, and at the initialization and the scale of the data.",
    ),
    "rising_loss": (
        "Nothing has to be done where targets move, as in reinforcement learning: the return counts. "
        "Else lower the learning rate.",
    ),
    "falling_learning_rate": (
        "Give the optimizer a lower learning rate or a longer warm-up; the scale shows by how much.",
        "Check the reasons of the rollbacks: each of them lowered it.",
    ),
}
