"""Detection, by syntax, of chat templates that write one message after another, independently of later messages.

They are `{% for message in messages %}...{% endfor %}{% if add_generation_prompt %}...{% endif %}`, where the loop
reads only its message, the first message and the number of messages before. Later messages do not change how such a
template renders earlier ones, so that one rendering contains all prefixes of a conversation.
"""

from collections.abc import Collection

from jinja2 import nodes

_PURE = (
    nodes.Output, nodes.TemplateData, nodes.Const, nodes.Add, nodes.Concat, nodes.And, nodes.Or, nodes.Not,
    nodes.Compare, nodes.Operand, nodes.If, nodes.CondExpr, nodes.Getitem, nodes.Getattr,
)  # fmt: skip
_PURE_FILTERS, _PURE_TESTS = frozenset({"trim"}), frozenset({"defined", "none", "string"})
_PURE_LOOP_ATTRIBUTES = frozenset({"first", "index", "index0"})


def mark_messages(template: nodes.Template, mark: str, constants: Collection[str]) -> bool:
    """Insert the variable `mark` before each message of such a template. Return False, with no change, for others.

    `constants`: names of variables that have the same value in every rendering.
    """
    loops = [node for node in template.body if isinstance(node, nodes.For)]
    if len(loops) != 1 or not _is_over_messages(loops[0]):
        return False
    (loop,), index = loops, template.body.index(loops[0])
    before, after = template.body[:index], template.body[index + 1 :]
    assert isinstance(loop.target, nodes.Name)
    fixed = frozenset(constants)
    if not (
        all(_is_pure(node, fixed, "") for node in before)
        and all(_is_prompt(node, fixed) for node in after)
        and all(_is_pure(node, fixed, loop.target.name) for node in loop.body)
    ):
        return False
    assert template.environment is not None  # parsed templates have one
    output = nodes.Output([nodes.Name(mark, "load")])
    loop.body.insert(0, output.set_lineno(loop.lineno).set_environment(template.environment))
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
    """Return whether the node writes only where a generation prompt is added."""
    return (
        isinstance(node, nodes.If)
        and isinstance(node.test, nodes.Name)
        and node.test.name == "add_generation_prompt"
        and not (node.elif_ or node.else_)
        and all(_is_pure(child, constants, "") for child in node.body)
    )


def _is_pure(node: nodes.Node, constants: frozenset[str], message: str) -> bool:
    """Return whether the node reads only `message` (empty outside the loop), the first message and their number."""
    if isinstance(node, nodes.Name):
        return node.name == message or node.name in constants
    if message and isinstance(node, nodes.Getattr | nodes.Getitem) and isinstance(owner := node.node, nodes.Name):
        if owner.name == "loop":
            return isinstance(node, nodes.Getattr) and node.attr in _PURE_LOOP_ATTRIBUTES
        if owner.name == "messages":
            return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == 0
    is_pure_kind = (
        isinstance(node, _PURE)
        or (isinstance(node, nodes.Filter) and node.name in _PURE_FILTERS)
        or (isinstance(node, nodes.Test) and node.name in _PURE_TESTS)
    )
    return is_pure_kind and all(_is_pure(child, constants, message) for child in node.iter_child_nodes())
