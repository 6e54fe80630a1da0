"""Plans as text, for people."""

from collections import Counter
from collections.abc import Sequence

from pisces_jax.planning.compiled import Plan
from pisces_jax.planning.memory import by_kind
from pisces_jax.utils.units import GIB, gib


def describe(plan: Plan) -> str:
    """The whole plan: memory, collectives, FLOPs, prediction, and what to change where it does not fit."""
    lines = [
        f"{plan.config} on {_where(plan)}, mesh {mesh_text(plan.mesh)}, batch {plan.batch_size}, "
        f"{plan.rows_per_device:g} rows per device, gradient-accumulation steps {plan.grad_accum_steps}, "
        f"remat {plan.remat}",
        "",
    ]
    if plan.usable_bytes is None:
        lines.append(f"memory    peak {gib(plan.peak_bytes)} per device (CPU: no known limit)")
    else:
        word = "fits" if plan.fits else "does NOT fit"
        spare = plan.usable_bytes - plan.peak_bytes
        rest = f"{gib(spare)} to spare" if spare >= 0 else f"{gib(-spare)} too much"
        lines.append(f"memory    {word}: peak {gib(plan.peak_bytes)} of {gib(plan.usable_bytes)} per device, {rest}")
    if plan.host_bytes:
        lines[-1] += f"; {gib(plan.host_bytes)} more in the host's memory"
    if plan.usable_is:
        lines.append(f"          usable:   {plan.usable_is}")
    figures = ", ".join(f"{k} {gib(v)}" for k, v in plan.compiler.items() if k not in ("peak", "host"))
    lines.append(f"          compiler: {figures or 'no figures, as it did not compile'}")
    lines.append("          analytic: " + ", ".join(f"{k} {gib(v)}" for k, v in by_kind(plan.memory).items()))
    largest = sorted(plan.memory.items(), key=lambda item: -item[1])[:6]
    lines.append("          largest:  " + ", ".join(f"{k} {gib(v)}" for k, v in largest))
    if plan.collectives:
        lines += ["", f"wire      {plan.wire_bytes_per_step / 1e9:.2f} GB per device and step"]
        lines += [f"          {line}" for line in collective_lines(plan)]
    flops = f"{plan.model_flops_per_step / 1e12:.2f} T per device and step"
    lines += ["", f"FLOPs     {flops} (model FLOPs, causal attention as half)"]
    if plan.model_flops_per_step_trained != plan.model_flops_per_step:
        lines[-1] += f", {plan.model_flops_per_step_trained / 1e12:.2f} T without frozen parts"
    lines += [f"          {part} {flops / 1e12:.3f} T" for part, flops in plan.model_flops_by_part.items()]
    if plan.roofline_seconds and plan.mfu_bound:
        bounds = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in plan.roofline_seconds.items())
        lines += ["", f"roofline  {bounds}; MFU at most {plan.mfu_bound:.1%}"]
        if plan.predicted_step_seconds and plan.predicted_mfu:
            lines.append(
                f"predicted {plan.predicted_step_seconds:.3f} s per step, MFU {plan.predicted_mfu:.1%} "
                "(a prediction: docs/scale.md)"
            )
        else:
            lines.append("predicted nothing: no run on such a chip says what share of these bounds a step reaches")
    lines += ["", f"compiled in {plan.compile_seconds:.0f} s"]
    if plan.fallbacks:
        lines += ["", "dimensions that do not divide:", *(f"  {text}" for text in plan.fallbacks)]
    if plan.advice:
        lines += ["", "to make it fit, change one or more:", *(f"  {text}" for text in plan.advice)]
    return "\n".join(lines)


def collective_lines(plan: Plan) -> list[str]:
    """Collectives by kind and mesh axis: gigabytes per device and step, and how many run."""
    sizes: Counter[tuple[str, str]] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    for c in plan.collectives:
        sizes[c["kind"], c["axis"]] += c["bytes"] * c["executions"]
        counts[c["kind"], c["axis"]] += c["executions"]
    return [
        f"{kind:<19} {axis:<24} {sizes[kind, axis] / 1e9:9.3f} GB in {counts[kind, axis]:>6}"
        for kind, axis in sorted(sizes, key=lambda key: -sizes[key])
    ]


def table(plans: Sequence[Plan]) -> str:
    """A Markdown table with a row per plan."""
    names = (
        "config", "topology", "mesh", "rows per device", "accumulation", "remat", "peak GiB", "fits", "wire GB",
        "bound s", "predicted s", "predicted MFU", "compile s",
    )  # fmt: skip
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for p in plans:
        bound = f"{p.bound_seconds:.2f}" if p.bound_seconds else "–"
        seconds = f"{p.predicted_step_seconds:.2f}" if p.predicted_step_seconds else "–"
        mfu = f"{p.predicted_mfu:.0%}" if p.predicted_mfu else "–"
        wire = f"{p.wire_bytes_per_step / 1e9:.1f}" if p.collectives else "–"
        lines.append(
            f"| {p.config} | {_where(p)} | {mesh_text(p.mesh)} | {p.rows_per_device:g} | {p.grad_accum_steps} | "
            f"{p.remat} | {p.peak_bytes / GIB:.2f} | {'yes' if p.fits else 'no'} | {wire} | {bound} | {seconds} | "
            f"{mfu} | {p.compile_seconds:.0f} |"
        )
    return "\n".join(lines)


def settings(plan: Plan) -> str:
    """The flags of `train` that run this plan."""
    sizes = [f"--config.mesh.{axis}={size}" for axis, size in plan.mesh.items()]
    part = "language_model" if "parameters/language_model" in plan.memory else "decoder"
    accumulation = f"--config.optimizer.grad_accum_steps={plan.grad_accum_steps}"
    return " ".join([*sizes, accumulation, f"--config.model.{part}.remat={plan.remat}"])


def mesh_text(mesh: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one device"


def _where(plan: Plan) -> str:
    return plan.topology if plan.slices == 1 else f"{plan.slices} × {plan.topology}"
