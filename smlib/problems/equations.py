"""The equations of a rationale, and which of them are false: all that a program can check of steps in word problems.

>>> false_equations("He has 9 + 4 = 13 apples. 13 * 2 = 25, so 10 / 3 = 3.33 each.")
('13*2=25',)
"""

import ast
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from operator import add, mul, sub, truediv

# "9 + 4 = 13", "$5 * (3 + 2) = $25": an arithmetic expression, "=" and a number.
_EQUATION = re.compile(r"[($€£]*\d[\d .,()$€£%+\-*/×÷x]*= *[-$€£]*\d[\d,.]*")
_NOT_IN_EQUATIONS = re.compile(r"[ ,$€£]|\.$")
# Left of what is only the end of an equation: "x + ", "-", "n - ", but not the dash that begins a line.
_BEGUN = re.compile(r"[+*/×÷=^] *$|[-−–]$|\S *[-−–] +$")
_OPERATORS: dict[type[ast.operator], Callable] = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv}
_LONGEST = 200  # characters of an equation that is computed


def equations(text: str) -> tuple[str, ...]:
    """The equations of a text in their order, as strings without blanks and currency; nothing is computed.

    >>> equations("Ann: 9 + 4 = 13.\\nBo has 2*$1,000=$2,000 now.")
    ('9+4=13', '2*1000=2000')
    """
    return tuple(map(_cleaned, _EQUATION.findall(text)))


def false_equations(text: str) -> tuple[str, ...]:
    """Those of a text's equations that do not hold, up to the rounding of their right side; those that cannot be
    computed, such as 2**3 = 8, 5 / 0 = 0 or the end of x + 3 = 7, are left out."""
    whole = (one for one in _EQUATION.finditer(text) if not _BEGUN.search(text[: one.start()]))
    return tuple(one for one in (_cleaned(found[0]) for found in whole) if _holds(one) is False)


def _cleaned(found: str) -> str:
    return _NOT_IN_EQUATIONS.sub("", found)


def _holds(equation: str) -> bool | None:
    """Whether both sides are equal, the left one rounded as the right one is; None: it cannot be computed."""
    left, _, right = equation.rpartition("=")
    if len(equation) > _LONGEST or "=" in left:
        return None
    try:
        stated = Decimal(right)
        written = ast.parse(re.sub(r"[×x]", "*", left).replace("÷", "/").replace("%", "/100"), mode="eval")
        difference = abs(_value(written.body) - Fraction(stated))
    except (SyntaxError, ValueError, ArithmeticError, KeyError):
        return None
    places = -stated.as_tuple().exponent
    return difference == 0 if places <= 0 else difference <= Fraction(1, 2 * 10**places)


def _value(node: ast.expr) -> Fraction:
    """The value of a tree of numbers and the four operations; KeyError or ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(f"not arithmetic: {ast.dump(node)[:60]}")
