"""How the page looks: indigo and gray, dark, glass, in Inter. Nothing is fetched from outside."""

from __future__ import annotations

import base64
from importlib.resources import files
from typing import Any

_FACES = ((400, "Regular"), (600, "SemiBold"))


def css() -> str:
    """The style sheet, the fonts inside it."""
    return "".join(_face(weight, name) for weight, name in _FACES) + _read("page.css").decode()


def _face(weight: int, name: str) -> str:
    """Inter's Latin letters, 30 kB a weight (SIL Open Font License, beside this file)."""
    font = base64.b64encode(_read(f"Inter-{name}.woff2")).decode()
    source = f"url(data:font/woff2;base64,{font})"
    return f'@font-face {{ font-family: "Inter"; font-weight: {weight}; font-display: block; src: {source}; }}'


def _read(name: str) -> bytes:
    return files("swiftwan.serve.page").joinpath(name).read_bytes()


def theme() -> Any:
    """Gradio's base theme in our colours; light and dark are the same, so that a visitor's setting changes nothing."""
    import gradio as gr

    font = ("Inter", "ui-sans-serif", "system-ui", "sans-serif")
    made = gr.themes.Base(
        primary_hue="indigo",
        secondary_hue="gray",
        neutral_hue="gray",
        radius_size=gr.themes.Size(
            name="soft", xxs="6px", xs="6px", sm="8px", md="10px", lg="12px", xl="14px", xxl="16px"
        ),
        spacing_size=gr.themes.sizes.spacing_md,
        font=font,
        font_mono=("ui-monospace", "monospace"),
    )
    colours = {
        "body_background_fill": "transparent",
        "body_text_color": "#f3f4fb",
        "body_text_color_subdued": "#b4b9d2",
        "background_fill_primary": "rgba(17, 19, 38, .72)",
        "background_fill_secondary": "rgba(255, 255, 255, .05)",
        "block_background_fill": "transparent",
        "block_border_color": "transparent",
        "block_label_background_fill": "transparent",
        "block_label_text_color": "#c7cbe0",
        "block_title_text_color": "#dfe2f2",
        "block_info_text_color": "#b4b9d2",
        "border_color_primary": "rgba(255, 255, 255, .13)",
        "input_background_fill": "rgba(255, 255, 255, .06)",
        "input_border_color": "rgba(255, 255, 255, .14)",
        "input_placeholder_color": "#8f95b2",
        "checkbox_background_color": "rgba(255, 255, 255, .08)",
        "checkbox_background_color_selected": "#6366f1",
        "checkbox_label_background_fill": "rgba(255, 255, 255, .06)",
        "checkbox_label_background_fill_hover": "rgba(129, 140, 248, .20)",
        "checkbox_label_background_fill_selected": "rgba(99, 102, 241, .38)",
        "checkbox_label_text_color": "#eef0fb",
        "checkbox_label_text_color_selected": "#ffffff",
        "button_primary_background_fill": "#4f46e5",
        "button_primary_background_fill_hover": "#6366f1",
        "button_primary_text_color": "#ffffff",
        "button_secondary_background_fill": "rgba(255, 255, 255, .09)",
        "button_secondary_background_fill_hover": "rgba(255, 255, 255, .16)",
        "button_secondary_text_color": "#f3f4fb",
        "slider_color": "#818cf8",
        "panel_background_fill": "transparent",
    }
    return made.set(
        checkbox_border_radius="4px", **colours, **{f"{name}_dark": value for name, value in colours.items()}
    )
