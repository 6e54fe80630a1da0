"""A model behind HTTP, in the forms of OpenAI's API.

python -m pisces_jax.serve --workdir=DIR
"""

import signal
import socket

from pisces_jax.utils import cli
from pisces_jax.utils.errors import UserError, run_command


def main() -> None:
    from pisces_jax.inference import flags as shared

    parser = cli.Parser(
        "serve",
        "Serves a model by HTTP in the forms of OpenAI's API: /v1/chat/completions (pictures as data URLs, streaming), "
        "/v1/images/generations and /v1/models, with /health and /metrics (Prometheus) beside them. It asks nobody who "
        "they are: open it beyond this machine only behind something that does. Needs the extra [serve].",
        ["--workdir=runs/shapes", "--workdir=runs/shapes --port=9000 --rows=16 --queue=128"],
    )
    shared.add_run_flags(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen at (default 127.0.0.1: this machine)"
    )
    parser.add_argument("--port", type=cli.whole_number(0), default=8000, help="default 8000; 0: one that is free")
    parser.add_argument(
        "--name", default="", help="what clients call the model (default: the name of the run's folder)"
    )
    parser.add_argument("--rows", type=cli.whole_number(1), default=8, help="texts or pictures at once (default 8)")
    parser.add_argument(
        "--queue", type=cli.whole_number(1), default=64, help="requests that may wait; others hear 'busy' (default 64)"
    )
    shared.add_context_flag(parser)
    parser.add_argument("--max_tokens", type=cli.whole_number(1), default=1024, help="longest answer (default 1024)")
    parser.add_argument(
        "--upload_mib", type=cli.whole_number(1), default=20, help="of the body of a request (default 20)"
    )
    parser.add_argument("--megapixels", type=cli.whole_number(1), default=32, help="of a picture sent (default 32)")
    shared.add_mesh_flags(parser)
    flags = parser.parse()

    try:
        import uvicorn

        from pisces_jax.inference.server import Server
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'pisces-jax[serve]'") from error
    from pisces_jax.inference.engine import Engine
    from pisces_jax.inference.model import load_model
    from pisces_jax.inference.requests import Limits

    try:
        place = socket.create_server((flags.host, flags.port))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--host={flags.host} --port={flags.port} cannot be used ({reason}): give another") from error
    cli.start()
    model = load_model(flags.workdir, flags.run, batch_size=flags.rows, **shared.device_choice(flags))
    engine = Engine(model, flags.rows, shared.context_choice(flags, model.config), flags.queue)
    limits = Limits(flags.upload_mib * 2**20, flags.megapixels * 10**6, tokens=flags.max_tokens)
    name = flags.name or flags.workdir.resolve().name
    app = Server(engine, name, limits, shared.drawing_choice(None, model.config)).app()
    settings = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=60)
    # uvicorn answers what it has, ends, and then raises the signal again: the command has ended well.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    cli.say(f"{name} is at http://{flags.host}:{place.getsockname()[1]}/v1 (SIGTERM or Ctrl-C ends it)")
    uvicorn.Server(settings).run([place])
    cli.say("ended: all requests were answered")


if __name__ == "__main__":
    run_command(main)
