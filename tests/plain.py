"""The mathematics of the models once more, in numpy and float64, written out: what tests compare with.

Nothing here is fast or general. Parameters are the package's own trees (layers stacked along a first axis).
"""

import math

import numpy as np


def randomised(tree, seed=0, sharpen=()):
    """Every leaf random and of a size that matters (nothing zero, no norm's scale 1); float64, by path.

    `sharpen` multiplies the leaves whose path holds one of these words by 3: attention then picks, and a
    mistake in what is attended to shows.
    """
    import jax

    rng = np.random.default_rng(seed)

    def leaf(path, x):
        names = [k.key for k in path]
        if names[-1] == "scale":
            value = 1 + 0.3 * rng.standard_normal(x.shape)
        elif names[-1] == "kernel":
            # How many inputs are summed is not known from the shape alone; the size is about right.
            value = rng.standard_normal(x.shape) * (x.size ** (1 / x.ndim)) ** -0.5
        else:
            value = 0.5 * rng.standard_normal(x.shape)
        return value * (3 if any(word in names for word in sharpen) else 1)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def layer(tree, index):
    """The parameters of one layer of a stack."""
    return {k: layer(v, index) if isinstance(v, dict) else v[index] for k, v in tree.items()}


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x, p=None, eps=1e-6):
    mean = x.mean(axis=-1, keepdims=True)
    y = (x - mean) / np.sqrt(((x - mean) ** 2).mean(axis=-1, keepdims=True) + eps)
    return y if p is None else y * p["scale"] + p["bias"]


def rms_norm(x, p, eps=1e-5):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * p["scale"]


def mlp(x, p, activation):
    return activation(x @ p["up"]["kernel"] + p["up"]["bias"]) @ p["down"]["kernel"] + p["down"]["bias"]


def swiglu(x, p):
    return (silu(x @ p["gate"]["kernel"]) * (x @ p["up"]["kernel"])) @ p["down"]["kernel"]


def attend(q, k, v, sees):
    """q [B, T, N, H], k and v [B, S, K, H]; `sees(b, t, s)` says whether query t sees key s. All loops."""
    B, T, N, H = q.shape
    group = N // k.shape[2]
    out = np.zeros(q.shape)
    for b in range(B):
        for n in range(N):
            for t in range(T):
                keys = [s for s in range(k.shape[1]) if sees(b, t, s)]
                scores = [sum(q[b, t, n, i] * k[b, s, n // group, i] for i in range(H)) for s in keys]
                scores = [score / math.sqrt(H) for score in scores]
                largest = max(scores)
                weights = [math.exp(score - largest) for score in scores]
                for weight, s in zip(weights, keys, strict=True):
                    out[b, t, n] += weight / sum(weights) * v[b, s, n // group]
    return out


def turn(x, positions, frequencies):
    """Rotary embedding as a product of complex numbers: dimensions i and i + H/2 are one of them."""
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    z = z * np.exp(1j * np.asarray(positions, float)[:, :, None, None] * frequencies)
    return np.concatenate([z.real, z.imag], axis=-1)


def llama3_frequencies(head_dim, base, scaling=None):
    """LLaMA 3.1's rotary frequencies as published: three branches over the wavelength of each pair."""
    result = []
    for i in range(head_dim // 2):
        frequency = 1.0 / base ** (2 * i / head_dim)
        if scaling is not None:
            factor, low, high, original = scaling
            wavelength = 2 * math.pi / frequency
            if wavelength > original / low:
                frequency = frequency / factor
            elif not wavelength < original / high:
                smooth = (original / wavelength - low) / (high - low)
                frequency = (1 - smooth) * frequency / factor + smooth * frequency
        result.append(frequency)
    return np.array(result)


def to_heads(x, p):
    return np.einsum("btd,dnh->btnh", x, p["kernel"]) + p.get("bias", 0.0)


def transformer(p, x, positions, frequencies, sees, eps=1e-5):
    """LLaMA's decoder: embeddings [B, T, D] to the states after the final norm."""
    for i in range(p["layers"]["mlp_norm"]["scale"].shape[0]):
        w = layer(p["layers"], i)
        y = rms_norm(x, w["attention_norm"], eps)
        q, k, v = (to_heads(y, w["attention"][n]) for n in ("query", "key", "value"))
        y = attend(turn(q, positions, frequencies), turn(k, positions, frequencies), v, sees)
        x = x + np.einsum("btnh,nhd->btd", y, w["attention"]["out"]["kernel"])
        x = x + swiglu(rms_norm(x, w["mlp_norm"], eps), w["mlp"])
    return rms_norm(x, p["final_norm"], eps)


def encoder_attention(x, p, sees=lambda b, t, s: True):
    q, k, v = (to_heads(x, p[n]) for n in ("query", "key", "value"))
    return np.einsum("btnh,nhd->btd", attend(q, k, v, sees), p["out"]["kernel"]) + p["out"]["bias"]


def patches(images, size):
    """[B, S, S, C] to [B, N, size·size·C], pixel by pixel."""
    B, S, _, C = images.shape
    side = S // size
    out = np.zeros((B, side * side, size * size * C))
    for b in range(B):
        for i in range(S):
            for j in range(S):
                for c in range(C):
                    place = ((i % size) * size + j % size) * C + c
                    out[b, i // size * side + j // size, place] = images[b, i, j, c]
    return out


def vit(p, images, *, patch, norm, activation, eps=1e-6, mean=0.5, std=0.5):
    """uint8 pictures to vectors, with whatever of stem, class token, final norm and output projection `p` has."""
    x = (images / 255.0 - mean) / std
    stem = sum(name.startswith("stem_") for name in p)
    for i in range(stem):
        x = gelu_tanh(convolution(x, p[f"stem_{i}"], eps))
    x = patches(x, patch // 2**stem)
    x = x @ p["patch_embedding"]["kernel"] + p["patch_embedding"]["bias"]
    if "class_token" in p:
        x = np.concatenate([np.tile(p["class_token"], (len(x), 1, 1)), x], axis=1)
    x = x + p["position_embedding"]
    for i in range(p["layers"]["norm1"]["scale"].shape[0]):
        w = layer(p["layers"], i)
        if norm == "pre":
            x = x + encoder_attention(layer_norm(x, w["norm1"], eps), w["attention"])
            x = x + mlp(layer_norm(x, w["norm2"], eps), w["mlp"], activation)
        else:
            x = x + layer_norm(encoder_attention(x, w["attention"]), w["norm1"], eps)
            x = x + layer_norm(mlp(x, w["mlp"], activation), w["norm2"], eps)
    if "final_norm" in p:
        x = layer_norm(x, p["final_norm"], eps)
    if "class_token" in p:
        x = x[:, 1:]
    if "output" in p:
        x = np.tanh(np.stack([x[:, n] @ p["output"][n] for n in range(x.shape[1])], axis=1))
    return x


def convolution(x, p, eps):
    """3×3 with stride 2 and zeros around, then a norm over each whole picture."""
    B, S, _, _ = x.shape
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = np.zeros((B, (S + 1) // 2, (S + 1) // 2, p["kernel"].shape[-1]))
    for i in range(y.shape[1]):
        for j in range(y.shape[2]):
            y[:, i, j] = np.einsum("bijc,ijcd->bd", x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3], p["kernel"])
    for one in y:
        one[:] = (one - one.mean()) / np.sqrt(one.var() + eps)
    return y * p["scale"] + p["bias"]


def pool(x, stride):
    """Average of stride×stride squares, [B, N, D] in raster order."""
    side = math.isqrt(x.shape[1])
    out = np.zeros((x.shape[0], (side // stride) ** 2, x.shape[2]))
    for n in range(x.shape[1]):
        i, j = divmod(n, side)
        out[:, i // stride * (side // stride) + j // stride] += x[:, n] / stride**2
    return out
