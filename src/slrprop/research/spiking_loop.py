"""The compiled loop of :mod:`slrprop.research.spiking`: one image shown to the network, with or without learning."""

import numpy as np
from numba import njit


@njit(cache=True)
def show(weight, theta, starts, inputs, ties, s, decays, learn):  # type: ignore[no-untyped-def]
    """Show one image: input spikes ``inputs[starts[t]:starts[t + 1]]`` at step t; learning changes ``weight`` and ``theta``.

    Returns:
        Spikes of each neuron, and all spikes of the inhibitory ones.
    """
    pixels, neurons = weight.shape
    counts = np.zeros(neurons, np.int64)
    v, resting = np.full(neurons, s.rest), np.zeros(neurons, np.int64)
    v_i, resting_i = np.full(neurons, s.rest_i), np.zeros(neurons, np.int64)
    driven, inhibiting, current = np.zeros(neurons), np.zeros(neurons), np.zeros(neurons)
    after, over = np.zeros(neurons), np.zeros(neurons, np.int64)  # trace of own spikes; who is over the threshold
    last, seen, many = np.zeros(pixels, np.int64), np.zeros(pixels, np.int64), 0  # of input spikes
    keep, keep_i, fade = decays
    faded = np.exp(-np.arange(s.steps) / s.trace)
    last[:] = -1
    spikes_i = 0
    if learn:
        theta *= np.exp(-s.steps / s.theta_tau)
    for t in range(s.steps):
        all_inhibiting = inhibiting.sum()
        spikes_i += int(all_inhibiting)
        for j in range(neurons):
            current[j] = -s.inhibition * (all_inhibiting - inhibiting[j])
        for place in range(starts[t], starts[t + 1]):
            i = inputs[place]
            row = weight[i]
            for j in range(neurons):
                current[j] += row[j]
            if learn:
                if last[i] < 0:
                    seen[many] = i
                    many += 1
                last[i] = t
                for j in range(neurons):
                    row[j] = max(row[j] - s.depression * after[j], 0.0)
        for j in range(neurons):
            v[j] = keep * (v[j] - s.rest) + s.rest + (current[j] if resting[j] <= 0 else 0.0)
            resting[j] = max(resting[j] - 1, 0)
            after[j] *= fade
        crossing = 0
        for j in range(neurons):
            if v[j] >= s.threshold + theta[j]:
                over[crossing] = j
                crossing += 1
                v[j], resting[j] = s.reset, s.refractory
                if learn:
                    theta[j] += s.theta_step
        for j in range(neurons):
            v_i[j] = keep_i * (v_i[j] - s.rest_i) + s.rest_i + (s.excitation * driven[j] if resting_i[j] <= 0 else 0.0)
            resting_i[j] = max(resting_i[j] - 1, 0)
            inhibiting[j] = 1.0 if v_i[j] >= s.threshold_i else 0.0
            if v_i[j] >= s.threshold_i:
                v_i[j], resting_i[j] = s.reset_i, s.refractory_i
            driven[j] = 0.0
        if crossing:
            winner = over[int(ties[t] * crossing)]
            driven[winner] = after[winner] = 1.0
            counts[winner] += 1
            if learn:
                for place in range(many):
                    i = seen[place]
                    weight[i, winner] = min(weight[i, winner] + s.potentiation * faded[t - last[i]], 1.0)
    if learn:
        total = np.zeros(neurons)
        for i in range(pixels):
            for j in range(neurons):
                total[j] += weight[i, j]
        for j in range(neurons):
            total[j] = s.weight_sum / total[j]
        for i in range(pixels):
            for j in range(neurons):
                weight[i, j] *= total[j]
    return counts, spikes_i
