"""Texts on which tokenizers part ways. What sets llama.cpp's pre-tokenizers apart: contractions,
digits, white space, punctuation and line ends, scripts, emoji, combining marks, code."""

# ruff: noqa: RUF001 - the ambiguous characters are what this is about

from __future__ import annotations

HARD = (
    "it's we'll I'D don't YOU'RE they've I'm he'd 'tis o'clock 'S 'll'LL",
    "1 12 123 1234 12345 1234567 3.14159 1,000,000 2026-05-18T07:08:09Z v1.2.3 0x1F x2y 7th",
    " 1  2   3 a1b22c333 ½²Ⅷ٣१२",
    "  two spaces,   three,    four, and trailing  ",
    "a\tb\t\tc\t \td \t",
    "line\nline\n\nline\n\n\nline \n line\n  line \r\nline\r\n\r\n \n\t\n",
    "\n", " ", "\t", "\n\n", "  ", " \n", "\n ", "   \n   ", "a\n", "a ", " a",
    "...!!! ?! (a) [b] {c} <d> \"e\" 'f' `g` -- — – … :; /\\ | & % $ # @ ^ ~ * + = _",
    "a.b a,b a;b (a)b .a .\n ,\n\n !\n\n\nx ).\n}\n",
    "    def f(x):\n        return x**2  # square\n\n\nclass A:\n\tpass\n",
    "for (int i=0;i<n;++i){a[i]+=b->c;} // x != y && z || !w",
    "SELECT COUNT(*) FROM t WHERE a = 'b' AND n >= 1000000;",
    "https://www.example.org/a/b?c=d&e=%20f#g mail@example.org C:\\x\\y",
    "camelCase snake_case UPPERCASE MixedCASE iPhone HTTPServer",
    "日本語のテキスト、中文文本。한국어 텍스트 ภาษาไทย हिन्दी عربى עברית русский ελληνικά",
    "日本語123中文abc한국 １２３ ＡＢＣ",
    "naïve café ÉCOLE Straße Ünïcödé Ål ñandú œuvre éÀb aÉ ÀÉÎ",
    "😀👍🏽 flag 🇩🇪 family 👩\u200d👩\u200d👧🏽 ❤️ a😀b 1😀2 😀\n😀",
    "e\u0301 a\u030a combining \u0301 e\u0301\u0302x E\u0301A",
    "a\u00a0b\u3000c\u2028d\u2029e\u200bf\ufeffg\u00adh",
    "\x00\x01\x07\x1b\x7f\x85",
    "<|im_", "<|", "<s", "</s", "<0x41>", "[PAD0]", "▁ a▁b ▁▁", "Ġ Ċ Ġa",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "--------------------", "====\n====", "        x",
)  # fmt: skip
POOL = "abXYZ0189  \t\n'’\".,;:!?(){}<>|=+-*/\\_@#$éÉüß日本한あ😀½²٣\u0301\u00a0\r"
