"""A hook of MkDocs: where a page shows code beside its equations, the code is open."""


def on_page_content(html, page, **kwargs):
    """The page's HTML, its folded sources unfolded on "How it works"."""
    folded = '<details class="mkdocstrings-source">'
    return html.replace(folded, folded.replace('>', ' open>')) if page.file.src_uri == 'how_it_works.md' else html
