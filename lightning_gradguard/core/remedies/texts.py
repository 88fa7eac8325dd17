"""The texts of advice and remedies.

`[clipping|...]` is the part of a text that does not apply to a run with clipping; the conditions are those of
`selection.Present`. `{where}` is the name of the module or parameter at fault, `{code}` the same as Python.
"""

#: By kind of incident.
BY_KIND = {
    "nonfinite_gradient": (
        "[rollback|Such a step leaves NaN in the weights: add NaNRollback(), which skips it and names the "
        "batch, the operation and the line of your code; NaNRollback(on_nonfinite='stop') stops there.]"
        "[sampled|Look for log(0), division by zero or sqrt at 0 before {where}; lower the learning rate if "
        "it repeats.]"
    ),
    "nonfinite_loss": (
        "Check this batch for nonfinite or huge inputs and bad labels, and compute the loss in float32 "
        "(torch.nn.functional.cross_entropy on logits rather than log of softmax)."
    ),
    "rejected_step": (
        "The step is finite: `check_step` of that callback has rejected it, and decides when that is right."
    ),
    **{
        f"nonfinite_{stage}": "Look at that batch for NaN or inf in its inputs, and at the "
        f"{stage} step for a log, a division or a root of 0."
        for stage in ("validation", "test")
    },
    "nonfinite_weights": (
        "An update was too large: lower the learning rate,[clipping| clip gradients "
        "(AdaptiveGradientClipping),] or bound the weights (weight_decay, a max-norm constraint)."
    ),
    "nonfinite_buffers": (
        "The batch corrupted running statistics of normalization, which evaluation uses: check it for "
        "nonfinite or huge inputs."
    ),
    "loss_spike": (
        "If spikes recur,[clipping| clip gradients (AdaptiveGradientClipping),] lower the learning rate or "
        "warm it up for longer, and check the batch."
    ),
    "divergence": (
        "Loss and gradient norm are far above those of the first steps: lower the learning rate or warm it "
        "up for longer[clipping|, clip gradients (AdaptiveGradientClipping)]"
        "[check|, check the initialization (InitializationCheck)]."
    ),
    "constant_clipping": (
        "With SGD, multiply the learning rate by {coefficient}: steps are as long then as clipped ones are. "
        "Else raise the bound, where clipping has one (max_norm, clipping, gradient_clip_val)."
        "[explained| Find out why norms are large (initialization, a sum where the loss needs a mean).]"
    ),
    "gradient_collapse": (
        "Most of the network no longer gets gradients, as when all units of a layer are dead: lower the "
        "learning rate or warm it up, use LeakyReLU or GELU, normalization or residual connections."
    ),
    "corrupted_gradient": (
        "The gradient of one rank differed by far after the all-reduce: suspect its memory, or code of your "
        "own that writes gradients. If it repeats on one machine, exclude that machine."
    ),
    "unequal_learning_rates": (
        "Ranks that train one network need one learning rate: log what ReduceLROnPlateau monitors with "
        "sync_dist=True, and set rates by what all ranks share."
    ),
    "amp_overflow": (
        "The loss scale has fallen to 1 and gradients still overflow in float16: train in bf16-mixed, or "
        "compute the overflowing layer in float32."
    ),
    "rollback": (
        "The weights are those of an earlier step;[backoff| add LearningRateBackoff or] lower the learning "
        "rate if it happens again."
    ),
    "learning_rate_backoff": (
        "If the scale keeps falling, give the optimizer a lower learning rate or a longer warm-up."
    ),
    "learning_rate_found": (
        "If no rollback follows, give the optimizer this learning rate, keep the clipping, and train from "
        "the start; a higher one diverged."
    ),
    "training_diverged": (
        "Lower the learning rate,[clipping| clip gradients (AdaptiveGradientClipping),][check| check the "
        "initialization (InitializationCheck)] and check the batches that were skipped."
    ),
    "lost_batch": (
        "The run lost this batch before it was resumed (lost_batches.rank0.jsonl); it is skipped again."
    ),
    "exception_in_step": (
        "The step raised on the values of this batch; NaNRollback(skip_invalid_batches=True) omits such "
        "batches and continues."
    ),
    "vanishing_gradient": (
        "Gradients vanish before they reach {where}:[no_attention| in a transformer normalize ahead of each "
        "layer (norm_first=True) and warm the learning rate up;] use non-saturating activations (ReLU, GELU) "
        "with He initialization (torch.nn.init.kaiming_normal_)[residual|, residual connections]"
        "[normalized|, batch or layer normalization];[feed_forward| in a recurrent network LSTM or GRU "
        "gating or an orthogonal recurrent weight;] layer-wise pre-training as a last resort."
    ),
    "exploding_gradient": (
        "Gradients explode at {where}:[clipping| clip them (AdaptiveGradientClipping),] lower the learning "
        "rate, use orthogonal or Xavier initialization, weight_decay or a max-norm constraint[feed_forward|; "
        "in a recurrent network LSTM or GRU gating and truncated BPTT]."
    ),
    "weight_stagnation": (
        "{where} no longer moves: check that its gradient is not zero (dead ReLU, saturated tanh), that its "
        "learning rate is above zero, and that weights are not kept in half precision."
    ),
    "stuck_loss": (
        "The loss does not fall, and the cause is not known. Train on one batch alone, "
        "Trainer(overfit_batches=1): if its loss falls, check that labels match their inputs; else look for "
        "saturating activations, a detach, or a term that outweighs the others[check|, and check the "
        "initialization (InitializationCheck)]. Try the learning rate 10 times higher, and 10 times lower; "
        "lightning-gradguard treat tries rates and other changes by itself."
    ),
    "dead_units": (
        "Most units of {where} are zero for every sample: [untrained|lower the learning rate, ]use LeakyReLU "
        "after it, He initialization[normalized|, and normalization before the activation]."
    ),
    "saturated_units": (
        "Units of {where} saturate: use Xavier initialization (torch.nn.init.xavier_uniform_), smaller "
        "inputs, normalization, or a non-saturating activation."
    ),
    "vanishing_weights": (
        "The weights of {where} go to zero: lower weight_decay and penalties on weights, and check that the "
        "units after it are alive."
    ),
    "poor_initialization": (
        "Initialize {where} for its activation: He (torch.nn.init.kaiming_normal_) before ReLU, Xavier "
        "before tanh or sigmoid[feed_forward|, orthogonal for recurrent weights]; or "
        "InitializationCheck(on_failure='repair')."
    ),
}

#: By cause of an incident or of a symptom.
BY_CAUSE = {
    "bad_input": (
        "Look at {where}: the data holds nonfinite or huge values. Clean or exclude the samples, and "
        "normalize inputs."
    ),
    "corrupted_weights": (
        "Single elements of {where} were corrupted: suspect memory or storage, or your own code that "
        "writes weights. If it repeats on one machine, exclude that machine."
    ),
    "update_too_large": (
        "An update was too large: lower the learning rate (InitializationCheck(rate_trial=True), or the "
        "command check, measures how far) or warm it up for longer,[clipping| clip gradients "
        "(AdaptiveGradientClipping),] or bound the weights (weight_decay, a max-norm constraint)."
    ),
    "forward_pass": (
        "{where} made the value from finite inputs: look for exp, log, division, a fully masked softmax row, "
        "or float16 overflow there; normalize its inputs, add an epsilon, or compute it in float32."
    ),
    "loss": (
        "The loss itself is undefined for this batch: look for log(0), a division by zero or a mean of "
        "nothing (all labels ignored) in the step; use losses on logits and an epsilon."
    ),
    "backward_pass": (
        "The loss is finite, its gradient is not: look for sqrt or norm at 0, a power below 1, or 0/0 under "
        "torch.where at {where}; move an epsilon inside."
    ),
    "optimizer_epsilon": (
        "The update of {where} was divided by 0: give the optimizer a larger eps, as in "
        "torch.optim.Adam(parameters, eps=1e-4). 1e-8 is enough for weights in float32 (as of "
        "precision='bf16-mixed' or '16-mixed'), and is 0 in float16. A lower learning rate and clipping do "
        "not help."
    ),
    "optimizer_step": (
        "The optimizer's own step makes {where} NaN where gradients are 0: look for a division by a norm of "
        "0 in it. A lower learning rate does not help."
    ),
    "nonfinite_learning_rate": (
        "Look at {where}, for a division by a number of steps of 0, as of a warm-up that lasts for the whole "
        "run: max(1, total - warmup). A lower learning rate and clipping do not help."
    ),
    "compiled_code": (
        "The code that torch.compile made of the step differs from the step: train without torch.compile, or "
        "leave out the module at fault (torch.compiler.disable), and report it to PyTorch with the dossier's "
        "batch."
    ),
    "transient": (
        "The same batch on the same weights is finite the second time: suspect an attribute that the step "
        "itself changes, code that writes gradients after backward (hooks, on_after_backward), a race, or "
        "the hardware. If it repeats on one machine only, exclude that machine."
    ),
    "softmax_before_loss": (
        "The loss applies the softmax or sigmoid itself: remove it after {where}, and give the loss logits, "
        "the output of {code}."
    ),
    "single_class": (
        "Use one output for each class, or binary_cross_entropy_with_logits on the one output of {where}."
    ),
    "not_log_probabilities": (
        "Use cross_entropy on the output of {where}, without a softmax, or give nll_loss, or "
        "kl_div, torch.nn.functional.log_softmax(output, 1) of it, and ctc_loss that over dimension -1: "
        "over the classes, not the batch."
    ),
    "broadcast_targets": "Give both one shape: {answer}.view_as({target}) in place of {answer}.",
    "labels_ignored": "Check the labels and ignore_index: none is left for the loss.",
    "targets_out_of_range": "Scale the targets to 0 .. 1, or use a loss for regression or for classes.",
    "unreachable_targets": (
        "Remove the activation after {where}, or scale the targets into its range (sigmoid 0 .. 1, "
        "tanh -1 .. 1); of a softmax, rows sum to 1: take a sigmoid for several labels at once."
    ),
    "single_value": (
        "Normalize over more values, as over channels, in fewer groups or larger batches, or remove {where}."
    ),
    "softmax_over_batch": "Take the softmax over the classes or the steps of a sample, dim=1, not 0.",
    "batch_as_time": "Make {where} with batch_first=True, or give it x.transpose(0, 1).",
    "view_for_transpose": "Exchange dimensions by transpose or permute, not by view or reshape.",
    "dropout": "Lower p of {where}, as to 0.1: it is the share that is set to 0, not the one that is kept.",
    "inverted_mask": (
        "Invert the mask of {where}: True means to ignore a key in nn.MultiheadAttention and nn.Transformer, "
        "and to attend to it in scaled_dot_product_attention; masked_fill fills where the mask is True."
    ),
    "constant_loss": (
        "The loss does not depend on {where}: check that it is computed from the network's output, without "
        "detach, item, argmax or rounding in between, and in float32: gradients below 6e-8 are 0 in float16."
    ),
    "tiny_gradient": (
        "The gradient of {where} is too small for any learning rate: multiply a tiny loss by a constant that "
        "makes it about 1; else look for a tiny factor in the network, or for what passes no gradient, as a "
        "clamp whose argument lies beyond its bounds."
    ),
    "not_in_optimizer": (
        "Give them to an optimizer, optimizer.add_param_group({{'params': {parameters}}}), or, if "
        "they are not to be trained, {code}.requires_grad_(False)."
    ),
    "not_registered": (
        "Keep them in torch.nn.ModuleList or ModuleDict (parameters in torch.nn.ParameterList), not in a "
        "list or a dictionary of Python, so that parameters() has those of {where}; if they are not to be "
        "trained, call them under torch.no_grad()."
    ),
    "replaced_parameters": (
        "Modules were replaced after the optimizer was made: make them in __init__, or make the optimizer "
        "after, with the parameters of {code}."
    ),
    "detached": (
        "Look for detach(), .data, torch.no_grad() or conversion to NumPy after {where}; if it is not to be "
        "trained, {code}.requires_grad_(False)."
    ),
    "zero_gradient": (
        "The gradient of {where} is exactly zero: look for what passes none after it, such as a clamp whose "
        "argument lies beyond its bounds, round, sign, argmax or a comparison (x + (x.round() - x).detach() "
        "passes it), dead or saturated units, or a factor of 0, as where both matrices of a low-rank adapter "
        "begin with zeros (the one that is nearer to the inputs begins with random weights)."
    ),
    "never_stepped": (
        "Call step() of the optimizer that holds the parameters of {where}, or, if they are not to be "
        "trained, {code}.requires_grad_(False)."
    ),
    "overwritten_weights": (
        "Something besides the optimizer writes the weights of {where}: look for load_state_dict, copy_, "
        "reset_parameters, or .data in a hook, a callback or the training step, and a network made anew."
    ),
    "cleared_gradients": (
        "Call zero_grad() before the backward pass, not between it and step(), and check that the loss "
        "depends on {where}."
    ),
    "frozen_weights": (
        "Load trained weights into {where}, or train them: {code}.requires_grad_(True) before the optimizer "
        "is made."
    ),
    "gradients_not_cleared": (
        "Call optimizer.zero_grad() before self.manual_backward(loss), once for each step; where "
        "optimizer_zero_grad is overridden, it has to clear the gradients too."
    ),
    "constant_input": (
        "Look at what the data loader yields: an index that is not used, an unknown token for every word, a "
        "scaling to 0, or a column that is filled with one value."
    ),
    "constant_target": (
        "Look at the labels that the data loader yields: a column that is filled with one value, files that "
        "are sorted by class and need shuffle=True, or a class that is rare and is to be drawn more often "
        "(torch.utils.data.WeightedRandomSampler); and at label_smoothing, usually 0.1."
    ),
    "unrelated_targets": (
        "Look at what the data loader yields: inputs or targets that are shuffled or sorted without the "
        "other, or an index that is off by one."
    ),
    "same_answers": (
        "What the loss asks for is met by one answer to all inputs: of a triplet or contrastive loss, lower "
        "the learning rate, normalize the embeddings (torch.nn.functional.normalize), and begin with random "
        "instead of the hardest negatives; of a VAE, lower the weight of the divergence or raise it "
        "from 0, and take the mean or the sum of both terms alike; of two views, keep negatives, or the "
        "predictor and stop-gradient of one side."
    ),
    "second_term": (
        "The other terms of the loss outweigh the one that compares the answers of {where}: take the mean or "
        "the sum of all alike, then a smaller weight of the others, or one that rises from 0.[no_divergence| "
        "Beside a mean over samples and features x, the divergence of a VAE is (-0.5 * (1 + logvar - mu**2 - "
        "logvar.exp())).sum(1).mean() / (x.numel() / len(x)); beside a mean over samples alone, without the "
        "division.]"
    ),
    "target_scale": (
        "Standardize the targets, (target - mean) / std, and scale the answers of {where} back where they "
        "are used."
    ),
    "learning_rate_too_low": (
        "Raise the learning rate, for all layers or at least for {where}: updates of about 1e-3 of the "
        "weights are usual."
    ),
    "learning_rate_schedule": (
        "[by_batch|Let a warm-up over batches step once a batch, in configure_optimizers: return "
        "{{'optimizer': optimizer, 'lr_scheduler': {{'scheduler': scheduler, 'interval': 'step'}}}}.]"
        "[has_rate| Begin the warm-up above 0, as (step + 1) / warmup does, or make it shorter.]"
        "[no_rate| Give the schedule the length of the run, in batches if it steps once a batch, else in "
        "epochs.]"
    ),
    "rounded_updates": (
        "Keep the weights of {where} in float32: precision='bf16-mixed' or '16-mixed', in place of "
        "'bf16-true' or '16-true'. A higher learning rate helps only where updates come above that bound."
    ),
    "input_scale": (
        "Scale the inputs to zero mean and unit variance, (x - x.mean(0)) / x.std(0), or begin with a "
        "normalization layer before {where}.{waves}"
    ),
    "data_scale": (
        "Standardize inputs x and targets y, both by the training data and before they are batched: "
        "x, y = [(t - t.mean(0)) / t.std(0) for t in (x, y)]; scale answers back where they are used. "
        "For pixels, one mean and std of all is usual."
    ),
    "small_weights": (
        "Initialize all layers for their activation, not {where} alone: before tanh "
        "[torch.nn.init.xavier_normal_({weight}, gain=5 / 3) {for_all}], before ReLU and GELU the "
        "same with kaiming_normal_({weight}, nonlinearity='relu')."
    ),
    "large_weights": (
        "Initialize all layers for their activation, not {where} alone: before ReLU "
        "[torch.nn.init.kaiming_normal_({weight}, nonlinearity='relu') {for_all}], before tanh the same with "
        "xavier_normal_({weight}, gain=5 / 3); or normalize after each."
    ),
    "large_answers": (
        "The answers of {where} are far larger than the targets ask for: {start}, and normalize before it."
    ),
    "saturating_activations": (
        "Use activations that do not saturate (ReLU, GELU), and initialize all layers for them: "
        "[torch.nn.init.kaiming_normal_({weight}, nonlinearity='relu') {for_all}]; or normalization, or "
        "residual connections."
    ),
    "saturating_loss": (
        "The loss of {where} is flat where the other network is certain. For a generator, minimize "
        "-log D(G(z)) in place of log(1 - D(G(z))), with logits "
        "torch.nn.functional.softplus(-discriminator(fake)).mean(); then fewer steps or a lower learning "
        "rate of the other network."
    ),
    "large_logits": (
        "The products of queries and keys are too large for the softmax. Divide them by the root of their "
        "width, q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, and begin with small weights: paste at the end "
        "of __init__, with model = self:\n{small}"
    ),
    "depth": (
        "[untrained|Lower the learning rate, or warm it up for longer, if this begins only after updates. ]"
        "[residual|Use residual connections, x = x + f(x), and PyTorch's default weights: He's are too large "
        "beside them. ]"
        "[check|Check the initialization from {where} on (InitializationCheck).]"
    ),
    "inactive_output": (
        "The output is 0 where the target is higher, and gets no gradient there: use LeakyReLU after "
        "{where}, more units, or another start (sign or seed of the weights). A higher learning rate does "
        "not help."
    ),
    "scaled_gradients_clipped": (
        "Clip after unscaling: move the clipping (self.clip_gradients, or clip_grad_norm_) into "
        "on_before_optimizer_step(self, optimizer) of the module, where gradients are unscaled, or remove "
        "it[clipping| and leave clipping to "
        "AdaptiveGradientClipping]."
    ),
    "clip_value_too_small": (
        "Raise the value to which gradients are clipped (gradient_clip_val of the Trainer, or that of your "
        "own code) to their usual norm or above, or remove it. The learning rate is not at fault."
    ),
    "unbounded_loss": (
        "Check the sign of the loss: of a likelihood, the negative logarithm is minimized. What it rewards "
        "has to be bounded, such as the scale of a distribution from below."
    ),
    "weight_decay": "Lower weight_decay: it moves the weights of {where} more than the loss does.",
    "vanishing_gradient: through_time": (
        "Hardly any gradient reaches the first steps of a sequence. Where the task needs them (else nothing "
        "has to be done), shorten the sequences, or {gated}"
    ),
    "padding": (
        "Most sequences of {where} end in padding, steps that are all the same. Read the answer before them, "
        "with model = self and x for what {code} gets:\n{packed}"
    ),
    "through_time": ("[clipping|Clip gradients (AdaptiveGradientClipping). ]{steadied}"),
}
