"""The text of a book in pages of HTML."""

from __future__ import annotations

import book

CONTENTS = '<a href="two.htm">2</a> <a href="mailto:x@y.htm">me</a> <a name="b" href="one.html">1</a><a href="two.htm">'


def test_pages_follow_the_table_of_contents(tmp_path):
    (tmp_path / "index.htm").write_text(CONTENTS)
    (tmp_path / "one.html").write_text("<title>no</title><p>first\n of <b>bo</b>ld<p>second<script>no()</script>")
    (tmp_path / "two.htm").write_bytes("<table><td>caf\xe9 &amp; tea</td><td> </td></table>end".encode("latin-1"))
    book.main([str(tmp_path / "index.htm"), str(tmp_path / "out.txt")])
    assert (tmp_path / "out.txt").read_text() == "caf\xe9 & tea\n\nend\n\nfirst of bold\n\nsecond\n"
