"""Small classes of values, as the standard library's `dataclasses` makes them, for less.

That module loads `inspect`, and with it 2.7 MB and twice the start of a bare interpreter; the
resident process would carry them for good. What the package needs of it is here: frozen or not,
always with slots, compared by all fields. A type checker sees the original.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
    from dataclasses import field as field
    from dataclasses import replace as replace
else:
    _MISSING = object()

    class _Field:
        __slots__ = ("default", "factory", "shown")

        def __init__(self, default, factory, shown):
            self.default, self.factory, self.shown = default, factory, shown

    def field(*, default=_MISSING, default_factory=None, repr=True):  # noqa: A002
        return _Field(default, default_factory, repr)

    def dataclass(*, slots, frozen=False):
        """Decorate a class whose annotations are its fields."""

        def decorate(cls):
            body = dict(cls.__dict__)
            for name in ("__dict__", "__weakref__"):
                body.pop(name, None)
            fields = {}
            for name in cls.__annotations__:
                found = body.pop(name, _MISSING)
                fields[name] = found if isinstance(found, _Field) else _Field(found, None, True)
            body["__slots__"] = body["__match_args__"] = tuple(fields)
            body["_shown"] = tuple(name for name, one in fields.items() if one.shown)
            body["__init__"] = _initializer(fields, frozen)
            body.setdefault("__repr__", _repr)
            body.setdefault("__eq__", _eq)
            if frozen:
                body.update(__setattr__=_refuse, __delattr__=_refuse)
                body.setdefault("__hash__", _hash)
            made = type(cls)(cls.__name__, cls.__bases__, body)
            made.__qualname__ = cls.__qualname__
            return made

        assert slots, "without slots it is the original that is wanted"
        return decorate

    def replace(value, **changes):
        """Make a copy of a value with some fields changed."""
        for name in value.__slots__:
            if name not in changes:
                changes[name] = getattr(value, name)
        return type(value)(**changes)

    def _initializer(fields, frozen):
        scope = {"put": object.__setattr__, "missing": _MISSING}
        arguments, lines = [], []
        for name, one in fields.items():
            value = name
            if one.factory is not None:
                scope[f"make_{name}"] = one.factory
                arguments.append(f"{name}=missing")
                value = f"make_{name}() if {name} is missing else {name}"
            elif one.default is not _MISSING:
                scope[f"default_{name}"] = one.default
                arguments.append(f"{name}=default_{name}")
            else:
                arguments.append(name)
            lines.append(f"put(self, {name!r}, {value})" if frozen else f"self.{name} = {value}")
        code = f"def __init__(self, {', '.join(arguments)}):\n " + "\n ".join(lines or ["pass"])
        exec(code, scope)  # noqa: S102  # names of our own classes' fields
        return scope["__init__"]

    def _repr(self):
        shown = (f"{name}={getattr(self, name)!r}" for name in self._shown)
        return f"{type(self).__qualname__}({', '.join(shown)})"

    def _eq(self, other):
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    def _hash(self):
        return hash(tuple(getattr(self, name) for name in self.__slots__))

    def _refuse(self, name, value=None):
        raise AttributeError(f"{type(self).__name__} is frozen: {name}")
