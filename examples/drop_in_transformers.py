"""Videos for a stock image model of transformers: one call patches the model and its processor.

    python examples/drop_in_transformers.py [CHECKPOINT VIDEO QUESTION]

By default the embedded model is asked about its sample video. CHECKPOINT is any LLaVA-1.5 or LLaVA-NeXT checkpoint in
Hugging Face format with a chat template. Needs the extras [video] and [llava].
"""

import sys

from transformers import AutoModelForImageTextToText, AutoProcessor

from sfllava_fast.embedded import model_dir, sample_questions, sample_video
from sfllava_fast.patch import patch_transformers

checkpoint, video, question = sys.argv[1:] or (str(model_dir()), str(sample_video()), sample_questions()[0])
model = AutoModelForImageTextToText.from_pretrained(checkpoint)
processor = AutoProcessor.from_pretrained(checkpoint)
print("stock model:", type(model).__name__)

with patch_transformers(model, processor):  # without `with`: patch = patch_transformers(...), then patch.undo()
    # The checkpoint's own prompt; the video takes the place of the image.
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    prompt = prompt.removeprefix(processor.tokenizer.bos_token or "").replace("<image>", "<video>")
    inputs = processor(text=prompt, videos=video, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    print(f"prompt: {length} tokens, {tokens} of them of the video")  # SlowFast tokens, as the model's layout has them
    ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)
print("question:", question)
print("answer:", processor.batch_decode(ids[:, length:], skip_special_tokens=True)[0].strip())
# Here, after the context, the model and the processor have their original attributes again.
