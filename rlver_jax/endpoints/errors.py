"""Why an endpoint gave no answer."""


class EndpointError(Exception):
    """The endpoint refuses and will again: the message names the request, the answer, and what to do."""


class ContextFull(EndpointError):
    """The messages are longer than the model's context."""


class Unavailable(EndpointError):
    """No answer before the deadline; the same request may be answered later."""


class Refused(EndpointError):
    """This one request is refused, as by a filter of contents; others may be answered."""
