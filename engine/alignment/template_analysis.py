"""Chat templates that write one message after another, each by itself: told by their syntax.

`{% for message in messages %}...{% endfor %}{% if add_generation_prompt %}...{% endif %}`, where the inside asks for
nothing but that message, the first one, and how many came before. What such a template writes of the first few messages
does not change with those that follow, so that one rendering tells all of a conversation's prefixes.
"""

from collections.abc import Collection

from jinja2 import nodes

_PURE = (
    nodes.Output, nodes.TemplateData, nodes.Const, nodes.Add, nodes.Concat, nodes.And, nodes.Or, nodes.Not,
    nodes.Compare, nodes.Operand, nodes.If, nodes.CondExpr, nodes.Getitem, nodes.Getattr,
)  # fmt: skip
_PURE_FILTERS, _PURE_TESTS = frozenset({"trim"}), frozenset({"defined", "none", "string"})
_OF_THE_LOOP = frozenset({"first", "index", "index0"})


def mark_messages(template: nodes.Template, mark: str, constants: Collection[str]) -> bool:
    """Lets it write the variable `mark` in front of each message. False, with nothing changed: it is no such template.

    `constants`: names of variables that are the same in every rendering.
    """
    loops = [node for node in template.body if isinstance(node, nodes.For)]
    if len(loops) != 1 or not _is_over_messages(loops[0]):
        return False
    (loop,), at = loops, template.body.index(loops[0])
    before, after = template.body[:at], template.body[at + 1 :]
    assert isinstance(loop.target, nodes.Name)
    fixed = frozenset(constants)
    if not (
        all(_is_pure(node, fixed, "") for node in before)
        and all(_is_prompt(node, fixed) for node in after)
        and all(_is_pure(node, fixed, loop.target.name) for node in loop.body)
    ):
        return False
    assert template.environment is not None  # a parsed one has it
    written = nodes.Output([nodes.Name(mark, "load")])
    loop.body.insert(0, written.set_lineno(loop.lineno).set_environment(template.environment))
    return True


def _is_over_messages(loop: nodes.For) -> bool:
    return (
        isinstance(loop.target, nodes.Name)
        and isinstance(loop.iter, nodes.Name)
        and loop.iter.name == "messages"
        and loop.target.name not in ("messages", "loop")
        and not (loop.else_ or loop.test or loop.recursive)
    )


def _is_prompt(node: nodes.Node, constants: frozenset[str]) -> bool:
    """Nothing is written unless there is to be a generation prompt."""
    return (
        isinstance(node, nodes.If)
        and isinstance(node.test, nodes.Name)
        and node.test.name == "add_generation_prompt"
        and not (node.elif_ or node.else_)
        and all(_is_pure(child, constants, "") for child in node.body)
    )


def _is_pure(node: nodes.Node, constants: frozenset[str], message: str) -> bool:
    """A function of `message` (none outside the loop), of how many came before it and of the first."""
    if isinstance(node, nodes.Name):
        return node.name == message or node.name in constants
    if message and isinstance(node, nodes.Getattr | nodes.Getitem) and isinstance(of := node.node, nodes.Name):
        if of.name == "loop":
            return isinstance(node, nodes.Getattr) and node.attr in _OF_THE_LOOP
        if of.name == "messages":
            return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == 0
    is_known = (
        isinstance(node, _PURE)
        or (isinstance(node, nodes.Filter) and node.name in _PURE_FILTERS)
        or (isinstance(node, nodes.Test) and node.name in _PURE_TESTS)
    )
    return is_known and all(_is_pure(child, constants, message) for child in node.iter_child_nodes())
