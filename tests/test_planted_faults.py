"""No module is unwatched: mistakes are planted into each, and the tests named beside them must fail.

`make test` plants the first of each module, `make faults` all of them. Each is planted in a process of its own, and undone by its end;
`tests/test_faults.py` holds the wrong formulas of the field, as functions."""
import importlib
import os
from typing import NamedTuple

import planted
import pytest
from conftest import ROOT
from forked import forked

EVERY = bool(os.environ.get("EVERY_FAULT"))


class Fault(NamedTuple):
    module: str
    right: str # stands once in the module
    wrong: str
    test: str # fails once it is planted


TABLE = {
"disk": [
    ('            os.fsync(f.fileno())\n        os.replace', '            pass\n        os.replace', "checkpoints::test_bytes_reach_the_disk_before_the_name"),
    ('finally: remove([temp])', 'finally: pass', "checkpoints::test_interrupt_removes_the_temporary_file"),
    ('os.replace(temp, path)', 'path.write_bytes(blob)', "checkpoints::test_a_reader_never_sees_half_a_file"),
    ('if path.exists() and not is_ours(path):', 'if False:', "cli::test_a_file_of_somebody_else_is_not_overwritten"),
    ('return bool(_MARKS.search(file.read(2**16)))', 'return b"diffusion_course" in file.read(2**16)', "cli::test_the_name_of_the_course_somewhere_is_no_mark"),
    ('    with suppress(OSError):                 # some', '    if True:                                # some', "checkpoints::test_folder_that_cannot_be_synced_is_no_failure"),
],
"identity": [
    ('hashed(0) == hashed(0)', 'True', "resume::test_a_data_set_whose_items_change_can_be_resumed"),
    ('loss=described(loss)', 'loss="loss"', "resume::test_another_run_is_refused_by_name"),
    ('sha256 {_sha256(schedule.alpha_bar)}"', '"', "resume::test_another_run_is_refused_by_name"),
    ('data=mark and f"sha256 {mark[:16]}"', 'data=None', "resume::test_another_run_is_refused_by_name"),
    ('or len(parts) > 2:', 'or False:', "resume::test_items_that_are_no_images_are_named"),
],
"flow_matching": [
    ('return noise / (signal + noise)', 'return noise', "flow_matching::test_flow_is_the_straight_line"),
    ('paired[rows] = eps[rows[torch.as_tensor(partner)]]', 'paired[rows[torch.as_tensor(partner)]] = eps[rows]', "flow_matching::test_coupled_noise_is_the_best_order"),
    ('if context is not None: groups', 'if False: groups', "flow_matching::test_coupled_noise_stays_within_a_context"),
    ('x0, start = pairs.chunk(2, dim=1)', 'start, x0 = pairs.chunk(2, dim=1)', "flow_matching::test_pair_loss_by_hand"),
    ('.abs().argmin(0) + 1', '.abs().argmin(0)', "flow_matching::test_on_schedule_by_the_nearest_time"),
    ('return prediction_from_x0(x0, xt, t, schedule)', 'return predict(xt, t)', "flow_matching::test_on_schedule_asks_at_the_same_noise_level"),
    ('.flatten(1).norm(dim=1) / steps.sum(0)', '.flatten(1).norm(dim=1) / steps.mean(0)', "flow_matching::test_detour"),
],
"check_flow": [
    ('lambda u, x, tau: x + (1 - tau) * u, inputs', 'lambda u, x, tau: x - tau * u, inputs', "flow_matching::test_right_answers"),
    ('compare(answer, of(lambda way, direct: 1 - direct / way), inputs', 'compare(answer, of(lambda way, direct: direct / way), inputs', "flow_matching::test_right_answers"),
],
"few_steps": [
    ('xs = add_noise(pred.x0, s, noise(xt), schedule) if s > 0 else pred.x0', 'xs = add_noise(pred.x0, s, pred.eps, schedule) if s > 0 else pred.x0', "few_steps::test_a_jump_by_hand"),
    ('xs = add_noise(pred.x0, s, noise(xt), schedule) if s > 0 else pred.x0', 'xs = add_noise(pred.x0, s, noise(xt), schedule)', "few_steps::test_a_jump_by_hand"),
    ('states[:, -1].float()', 'states[:, 0].float()', "few_steps::test_walk_loss_by_hand"),
    ('weights[0] = first', 'weights[-1] = first', "few_steps::test_the_first_state_is_shown_more_often"),
    ('xT = initial_noise(rows.tolist(), shape, seed=seed)', 'xT = initial_noise(len(rows), shape, seed=seed)', "few_steps::test_a_walk_does_not_depend_on_its_batch_and_draws_no_global_noise"),
    ('xt, xs = add_noise(x0, t, eps, schedule), add_noise(x0, s, eps, schedule)', 'xt, xs = add_noise(x0, t, eps, schedule), add_noise(x0, s, fresh_noise(x0, context, generator), schedule)', "few_steps::test_consistency_loss_by_hand"),
    ('with torch.no_grad(): # the target is held still', 'if True:', "few_steps::test_the_gradient_of_the_consistency_loss_leaves_the_target_alone"),
    ('torch.where(at_0, x0, below)', 'below', "few_steps::test_consistency_loss_by_hand"),
    ('slope = (fake_x0 - real_x0)', 'slope = (real_x0 - fake_x0)', "few_steps::test_the_gradient_leads_from_fake_to_real"),
    ('(x - real_x0).abs().flatten(1).mean(1)', '(x - real_x0).abs().mean().expand(len(x))', "few_steps::test_every_image_counts_alike"),
    ('stop, ts = int(torch.randint(n, (), generator=generator)), schedule.timesteps(n)', 'stop, ts = n - 1, schedule.timesteps(n)', "few_steps::test_the_student_is_stopped_at_every_jump_that_it_will_make"),
    ('loss = loss + hold * walk_loss(', 'loss = loss + 0 * walk_loss(', "few_steps::test_without_a_hold_the_walks_have_no_say"),
],
"check_few": [
    ('return torch.where(choose(share, p), a, b)', 'return torch.where(choose(share, 1 - p), a, b)', "few_steps::test_right_answers"),
    ('def matching(answer: Callable) -> Result:', 'def matching(answer: Callable) -> Result:\n    answer = lambda x, r, f: (x * (f - r).detach()).sum() / len(x)\ndef unused(answer):', "few_steps::test_wrong_answers_are_told_why"),
    ('if shape(found) != shape(net):', 'if False:', "few_steps::test_the_challenge_refuses_what_is_no_entry"),
],
"editing": [
    ('pred = predict(xt, t)\n            mean, var', 'pred = predict(xt, s or t)\n            mean, var', "editing::test_one_round_by_hand"),
    ('if again: xt = forward(xs, s, t, noise(xt), schedule)', 'if again: xt = xs', "editing::test_inpainting_comes_near_to_the_posterior"),
    ('add_noise(known, s, z, schedule), drawn)', 'add_noise(known, t, z, schedule), drawn)', "editing::test_one_round_by_hand"),
    ('share**0.5 * xs + (1 - share)', 'xs + (1 - share)', "editing::test_forward_composes"),
    ('walk = Schedule(schedule.alpha_bar[: t + 1])', 'walk = schedule', "editing::test_a_sketch_ends_where_the_ode_ends"),
    ('xs, zs = [add_noise(x0, t, noise(x0), schedule) for t in ts], []', 'xs, zs = [add_noise(x0, t, zero, schedule) for zero in [noise(x0)] for t in ts], []', "editing::test_each_state_has_a_noise_of_its_own"),
    ('x0 = x0 + measure.back(y - measure.of(x0))', 'x0 = x0 + measure.gain * measure.back(y - measure.of(x0))', "editing::test_ddnm_is_a_projection"),
    ('return 1 / (std**2 + measure.gain * unsure)', 'return 1 / (std**2 + unsure)', "editing::test_dps_with_the_spread_is_exact_for_gaussian_pixels"),
    ('noise**2 / signal', 'noise / signal', "editing::test_a_linear_wish_tilts_a_gaussian"),
    ('torch.autograd.grad(score.sum(), x)', 'torch.autograd.grad(score.sum(), x0)', "editing::test_a_measured_pixel_moves_the_one_that_is_not_seen"),
],
"check_edit": [
    ('compare(answer, held(), inputs', 'compare(answer, held(keep=lambda m: 1 - m), inputs', "editing::test_right_answers"),
    ('compare(answer, lambda x, y: x + y - grey(x), inputs', 'compare(answer, lambda x, y: x - y + grey(x), inputs', "editing::test_right_answers"),
],
"views": [
    ('return Prediction(*map(back, predict(turned, t)))', 'return predict(turned, t)', "editing::test_a_symmetric_mean_draws_symmetric_pictures"),
],
"edit_command": [
    ('< 128', '> 128', "cli_edit::test_fill_is_inpaint"),
    ('if name and Path(out).resolve() == Path(name).resolve():', 'if False:', "cli_edit::test_mistakes"),
    ('keep[rows, columns] = ', 'keep[columns, rows] = ', "cli_edit::test_what_is_black_stays_in_any_size"),
],
"arguments": [
    ('if name == "jumps" and model.about.get("sampler") != "jumps":', 'if False:', "cli::test_jumps_need_a_network_that_has_learned_them"),
    ('name = sampler or model.about.get("sampler", SAMPLER)', 'name = sampler or SAMPLER', "cli::test_a_model_may_say_how_it_draws_best"),
    ('eta = ETAS.get(name) if eta is None else eta', 'eta = eta', "cli::test_the_default_is_what_drew_best"),
    ('if not value >= low or', 'if not value > low or', "cli::test_numbers_are_classes_too"),
    ('weights.get(names[found[1]], 0.0) + weight', 'weight', "fuzz::test_any_class_can_be_asked_for"),
    ('return clipped(cond, model.schedule)', 'return cond', "cli::test_sample_is_sample"),
    ('names = {**{str(i): i for i in range(len(classes))}, **names}', 'names = {**names, **{str(i): i for i in range(len(classes))}}', "fuzz::test_any_class_can_be_asked_for"),
    ('if Path(text).exists() and text:', 'if False:', "cli::test_existing_folders_win_over_keywords_and_commas"),
],
"picture_files": [
    ('small.getexif()[0x0112] = orientation', 'small.getexif()[0x0112] = 1', "pictures::test_a_camera_held_upright"),
    ('paper = Image.new("RGB", image.size, "white")', 'paper = Image.new("RGB", image.size, "black")', "pictures::test_conversion"),
    ('((size - small.width) // 2, (size - small.height) // 2)', '(0, 0)', "pictures::test_fits_in_the_middle"),
    ('Image.Resampling.BOX if side > size else', 'Image.Resampling.BOX if side < size else', "pictures::test_conversion"),
    ('long >= 3 * short', 'long >= 5 * short', "pictures::test_animation_strips"),
    ('shift = top.bit_length() - 8', 'shift = 8', "pictures::test_ranges_of_16_bits"),
    ('remarks + ["animation"] * _moves(file)', 'remarks', "pictures::test_animations_give_their_first_frame"),
],
"folders": [
    ('if (kind, top) != ("16-bit", 65535):', 'if False:', "pictures::test_ranges_of_16_bits"),
    ('text = unicodedata.normalize("NFC", name)', 'text = name', "pictures::test_both_unicode_forms_are_one_class"),
    ('return "pipe or device"', 'return None', "pictures::test_a_pipe_is_not_waited_for"),
    ('if MARKER in names:', 'if False:', "pictures::test_our_own_training_is_no_data"),
    ('.std((1, 2)) < 1)', '.std((1, 2)) < 0)', "pictures::test_nearly_blank_pictures"),
    ('if len(set(names)) == 1 and len(inner) > 1', 'if False and len(inner) > 1', "pictures::test_one_class_of_folders_is_asked_about"),
],
"arrays": [
    ('((rows != 0) & (rows != 1)).any(1) |', '(rows < 0).any(1) |', "pictures::test_wrong_arrays"),
    ('return np.arange(n) % period % 10 == 9', 'return np.arange(n) % 10 == 9', "pictures::test_from_npy_does_not_leak"),
    ('if images.dtype != np.uint8:', 'if False:', "pictures::test_wrong_arrays"),
    ('if not 0 <= low <= high < k:', 'if not low <= high < k:', "pictures::test_wrong_arrays"),
    ("' * 255' if high <= 1 else ''", "' * 255' if high < 1 else ''", "pictures::test_images_that_a_line_mends"),
    ('if len(labels) != n:', 'if False:', "pictures::test_wrong_arrays"),
],
"pictures": [
    ('.to(torch.float32) / 127.5 - 1', '.to(torch.float32) / 128 - 1', "pictures::test_items"),
    ('pixels.permute(0, 3, 1, 2)', 'pixels.permute(0, 3, 2, 1)', "pictures::test_items"),
    ('self.labels[indices]', 'self.labels[:len(indices)]', "pictures::test_batches_equal_items"),
    ('self.images[:, :, ::-1]', 'self.images[:, ::-1]', "pictures::test_mirrored"),
    ('total.update(np.ascontiguousarray(self.labels, dtype="<i8"))', 'pass', "pictures::test_fingerprint"),
    ('rows = np.flatnonzero(held == (split == "heldout"))', 'rows = np.flatnonzero(held != (split == "heldout"))', "pictures::test_folder_splits"),
],
"judge": [
    ('.sort(1).values.numpy()', '.numpy()', "judge::test_copies_are_never_on_both_sides"),
    ('_learn(net, data, parts.fitted,', '_learn(net, data, np.arange(len(data)),', "judge::test_it_is_fitted_on_its_half_only_and_measured_on_the_other"),
    ('net.std.copy_(seen.std(0).clamp(min=1e-3))', 'pass', "judge::test_features_are_standardised_and_separate_the_classes"),
    ('return x.clamp(-1, 1), torch.cat(', 'return x, torch.cat(', "judge::test_every_flaw_changes_the_picture_and_is_told"),
    ('with torch.random.fork_rng(devices=[]):         #', 'if True:         #', "judge::test_a_seed_decides_everything_and_the_random_state_stays"),
    ('if len(data) < LEAST:', 'if len(data) <= LEAST:', "judge::test_too_few_pictures_and_the_advice"),
    ('loss = F.cross_entropy(net.head(seen), answer, label_smoothing=0.05) +', 'loss =', "judge::test_it_names_what_it_has_not_seen"),
],
"muon": [
    ('alpha=group["lr"] * max(1, rows / columns)', 'alpha=group["lr"] * max(1, columns / rows)', "muon::test_step_by_hand"),
    ('average.lerp_(p.grad, 1 - group["momentum"])', 'average.lerp_(p.grad, group["momentum"])', "muon::test_step_by_hand"),
    ('ahead = p.grad.lerp(average, group["momentum"]).flatten(1)', 'ahead = average.flatten(1)', "muon::test_step_by_hand"),
    ('product, gram = p @ product, p @ gram @ p', 'product, gram = p @ product, p @ gram', "muon::test_every_singular_value_goes_through_the_polynomial"),
    ('if p.ndim < 2 or name.startswith(others)', 'if p.ndim < 2', "muon::test_every_weight_has_one_optimiser"),
],
"precision": [
    ('return answer.to(x.dtype)', 'return answer', "machines::test_a_fast_network_answers_in_the_dtype_of_the_images"),
    ('enabled=dtype is not None', 'enabled=False', "machines::test_a_fast_network_answers_in_the_dtype_of_the_images"),
    ('if forced in PRECISIONS: return', 'if forced in ("float32",): return', "machines::test_precision_can_be_set"),
    ('except (AttributeError, RuntimeError): return False', 'except KeyError: return False', "machines::test_without_onednn"),
],
"resume": [
    ('        first += n', '        first += 0', "resume::test_resumed_run_is_the_whole_run"),
    ('if k != "step" and state.settings.get(k, v) != v}', 'if False}', "resume::test_another_run_is_refused_by_name"),
    ('generator=seeded(seed, 0, epoch)', 'generator=seeded(seed, 0, 0)', "resume::test_every_epoch_sees_every_image_once"),
],
"training": [
    ('groups = [group for part in optimizers for group in part.param_groups]', 'groups = [group for part in optimizers[:1] for group in part.param_groups]', "muon::test_the_rate_of_every_optimiser_falls"),
    ('dict(optimizer=described(optimizer))', 'dict(optimizer="")', "resume::test_another_run_is_refused_by_name"),
    ('share = torch.randn(n, generator=generator).sigmoid()', 'share = torch.rand(n, generator=generator).sigmoid()', "muon::test_middle_times_are_logit_normal"),
],
"metrics": [
    ('pairs = 2 * (same_x - row_x - same_z + row_z)', 'pairs = same_x - row_x - same_z + row_z', "metrics::test_error_of_a_difference"),
    ('images = 4 * (witness_x.var() / m + witness_y.var() / n)\n', 'images = 2 * (witness_x.var() / m + witness_y.var() / n)\n', "metrics::test_the_standard_error_is_the_spread_over_new_draws"),
    ('/ x.shape[1] + 1) ** 3', '/ x.shape[1] + 1) ** 2', "metrics::test_kid_is_equation_4_and_no_wrong_version"),
    ('(n * _kernel_means(x, x)[0] - itself) / (n - 1)', '_kernel_means(x, x)[0]', "metrics::test_kid_is_unbiased"),
    ('+ cov_y.trace() - 2 * cross', '+ cov_y.trace() - cross', "metrics::test_frechet_of_gaussians_without_common_axes"),
    ('kthvalue(k + 1, dim=1)', 'kthvalue(k, dim=1)', "metrics::test_coverage_counts"),
    ('(probabilities.argmax(1) == labels)', '(probabilities.argmax(1) >= labels)', "metrics::test_it_knows_the_classes_of_sprites_it_has_not_seen"),
    ('closer = smallest < best - TIE', 'closer = smallest < best', "metrics::test_a_copy_has_distance_zero_and_almost_a_copy_has_not"),
    ('return x.clamp(-1, 1)', 'return x', "metrics::test_images_in_0_1_are_suspicious_and_values_beyond_1_are_clamped"),
],
"stickers": [
    ('np.random.default_rng([seed, k, number])', 'np.random.default_rng([seed, k, n])', "judge::test_stickers_are_the_same_whatever_else_is_drawn"),
    ('np.random.default_rng([seed, k, number])', 'np.random.default_rng([k, number])', "judge::test_stickers_are_the_same_whatever_else_is_drawn"),
    ('return whole.resize((self.side // 4,) * 2, Image.Resampling.BOX)', 'return whole', "judge::test_stickers_have_the_size_that_was_asked_for"),
    ('number, k = divmod(i, len(STICKERS))', 'number, k = i, 0', "judge::test_it_names_what_it_has_not_seen"),
    ('value < least:', 'value < 0:', "judge::test_stickers_refuse"),
],
"train_command": [
    ('if stop or step.step % every == 0 or step.step == steps:', 'if step.step % every == 0 or step.step == steps:', "cli::test_foreign_files_with_names_like_ours_stay"),
    ('if done is not None and not resume:', 'if False:', "cli::test_interrupted_and_resumed_is_uninterrupted"),
    ('return (found.mirrored() if mirror else found), split', 'return found, split', "cli::test_a_resumed_run_names_what_differs"),
    ('loss=with_dropped_context(partial(prediction_loss, times=middle_times), drop)', 'loss=partial(prediction_loss, times=middle_times)', "cli::test_a_resumed_run_names_what_differs"),
    ('["--"] if what.startswith("-") else []', '[]', "cli::test_every_class_can_be_asked_for_and_the_suggestion_works[-x]"),
    ('if state is None and not any(folder.glob("step-*")): remove_training(folder)', 'pass', "cli::test_mistakes_in_train"),
    ('classes=list(data.class_names), size=size,', 'size=size,', "cli::test_train_on_a_folder_then_sample"),
],
"evaluate_command": [
    ('if judged is found:', 'if False:', "cli::test_evaluate_with_few_pictures"),
    ('if judge.about.get("fingerprint") == data.fingerprint: return judge', 'return judge', "cli::test_evaluate_says_when_the_pictures_are_others"),
    ('reals.more, reals.labels, reals', 'reals.reference, reals.labels, reals', "cli::test_evaluate_judges_a_model_of_own_pictures"),
    ('chosen.about.get("fingerprint") not in (None, known.fingerprint)', 'False', "cli::test_evaluate_says_when_the_pictures_are_others"),
    ('training.mirrored() if chosen.about.get("mirror") else training', 'training', "cli::test_evaluate_judges_a_model_of_own_pictures"),
    ('save_judge(path, judge, fingerprint=data.fingerprint)', 'pass', "cli::test_evaluate_judges_a_model_of_own_pictures"),
],
"cli": [
    ('except KeyboardInterrupt as stop: return _mistake(str(stop) or "stopped", 130)', 'except KeyboardInterrupt as stop: return 0', "cli::test_foreign_files_with_names_like_ours_stay"),
    ('if copy.exists(): kept += 1', 'if False: pass', "cli::test_lessons_are_copied_and_nothing_is_overwritten"),
    ('states = states[::max(1, len(states) // 25)] + states[-1:]', 'states = states[-1:]', "cli::test_gif"),
    ('stream.reconfigure(errors="backslashreplace")', 'pass', "cli::test_a_terminal_that_cannot_print_a_name_is_no_error[latin-1]"),
    ('steps=steps, shape=shape, seed=seed, progress=n * steps > 500)', 'steps=steps, shape=shape, progress=n * steps > 500)', "cli::test_sample_is_sample"),
],
"checkpoints": [
    ('with torch.random.fork_rng(devices=[]): net = ContextUnet', 'if True: net = ContextUnet', "checkpoints::test_loading_draws_no_random_numbers"),
    ('if header.pop("crc32", "") != _checksum(head, data):', 'if header.pop("crc32", "") and False:', "checkpoints::test_broken_files_are_explained"),
    ('return net.to(device).eval(), metadata', 'return net.to(device), metadata', "checkpoints::test_model_round_trip"),
    ('if int(found[2]) > VERSION:', 'if False:', "checkpoints::test_broken_files_are_explained"),
    ('if _step_of(p) <= step and is_ours(p)][:-keep]', 'if is_ours(p)][:-keep]', "checkpoints::test_the_newest_are_kept_and_later_steps_never_lost"),
    ('if path.exists() and not is_ours(path):', 'if False:', "checkpoints::test_foreign_files_with_the_names_of_states_stay"),
    ('header["schedule"] = json.dumps(schedule.alpha_bar.tolist())', 'header["schedule"] = json.dumps(schedule.alpha_bar.float().tolist())', "checkpoints::test_schedule_is_stored_exactly"),
    ('return sorted((p for p in Path(dir).glob("step-*.safetensors") if _step_of(p) is not None), key=_step_of)', 'return sorted(p for p in Path(dir).glob("step-*.safetensors") if _step_of(p) is not None)', "checkpoints::test_the_newest_are_kept_and_later_steps_never_lost"),
],
"guards": [
    ('if low < first or high > T:', 'if high > T:', "sampling::test_times_outside"),
    ('    if x.shape == torch.Size(shape): return x', '    if len(x.shape) == len(shape): return x', "sampling::test_posterior_does_not_broadcast"),
    ('ts[-1] != 0 or', 'False or', "sampling::test_bad_times_to_visit"),
    ('if not (ab_s > ab_t).all():', 'if not (ab_s >= ab_t).all():', "sampling::test_posterior_goes_back_in_time"),
    ('if (signal > 0).all(): return signal', 'return signal', "fast_sampling::test_noise_prediction_needs_signal"),
    ('    if t.shape != (n,):', '    if False:', "unet::test_inputs_that_do_not_fit"),
    ('    if x.is_floating_point(): return x', '    return x', "sampling::test_images_of_whole_numbers"),
    ('if type(value) is int and value >= least and', 'if value >= least and', "sampling::test_bad_seeds"),
],
"noise": [
    ('np.random.default_rng([seed, stream, i])', 'np.random.default_rng([seed, i])', "sampling::test_noise_streams"),
    ('for i in guards.samples(n)]', 'for i in range(len(guards.samples(n)))]', "sampling::test_noise_per_sample"),
    ('if len(xt) != len(generators):', 'if False:', "sampling::test_noise_made_for_another_n"),
    ('steps = max(1, min(2 * steps, BLOCK // xt.numel()))', 'steps = 2 * steps', "machines::test_blocks_are_few_and_bounded"),
],
"check_sampling": [
    ('_loop(lambda mean, var, z, beta, end: mean + var * z)', '_loop(lambda mean, var, z, beta, end: mean + var.sqrt() * z)', "check::test_each_wrong_answer_gets_its_own_reason"),
],
"check_training": [
    ('demand(t.min() > 0,', 'demand(t.min() > -1,', "check::test_each_wrong_answer_gets_its_own_reason"),
],
"context": [
    ('keep = torch.rand(len(guards.table(context)), 1, generator=generator) >= p', 'keep = torch.rand(1, 1, generator=generator) >= p', "context::test_context_is_dropped_row_by_row"),
    ('u + scale * (c - u)', 'c + scale * (c - u)', "context::test_guidance"),
    ('context[0, _index(name, list(classes))] += weight', 'context[0, _index(name, list(classes))] = weight', "context::test_mix"),
    ('whole = isinstance(name, Real) and not isinstance(name, bool)', 'whole = isinstance(name, Real)', "context::test_one_hot_of_no_class"),
    ('if scale == 1: return cond', 'if scale == 1: return uncond', "context::test_guidance_by_1_and_0_is_the_prediction_itself"),
],
"unet": [
    ('skips.append(h)  ', 'skips.append(h * 0)  ', "unet::test_skip_connections"),
    ('return F.silu(cond)', 'return cond', "unet::test_condition_against_the_formula"),
    ('h = self.middle3(self.middle2(self.middle1(h, cond), cond), cond)', 'h = self.middle3(self.middle2(self.middle1(h, cond), cond * 0), cond)', "unet::test_condition_reaches_block"),
    ('cond = cond + self.context_embedding', 'cond = cond - self.context_embedding', "unet::test_condition_against_the_formula"),
    ('        for hook in hooks: hook.remove()', '        pass', "unet::test_block_shapes_lists_every_part_in_order_and_leaves_no_hook"),
],
"plots": [
    ('x = (x.float() + 1) * 127.5', 'x = (x.float() - x.min()) / (x.max() - x.min()) * 255', "plots::test_no_stretch_per_image_or_channel"),
    ('x.clamp(0, 255).round()', 'x.clamp(0, 255)', "plots::test_mapping_is_one_straight_line"),
    ('x.clamp(0, 255).round()', 'x.round()', "plots::test_mapping_is_one_straight_line"),
],
"sprites": [
    ('attempt += 1', 'attempt += 2', "sprites::test_bytes_never_change"),
    ('labels = _throw(_stream(seed, index, 0), 0, len(CLASSES))', 'labels = index.astype(int) % 5', "sprites::test_neighbouring_labels_are_independent"),
    ('todo = todo[is_heldout(images[todo]) != (split == "heldout")]', 'todo = todo[:0]', "sprites::test_train_and_heldout_are_disjoint"),
],
"widgets": [
    ('marked[i // w, i % w] = brush.value == BRUSHES[0]', 'marked[i // w, i % w] = brush.value != BRUSHES[0]', "widgets::test_painting_marks_and_fills"),
    ('sample(_asked(net, schedule, context, scale, n), schedule, n, sampler=dpmpp_2m, steps=steps, seed=seed)', 'sample(_asked(net, schedule, context, scale, n), schedule, n, sampler=dpmpp_2m, steps=steps)', "widgets::test_mixer_draws_what_was_asked"),
    ('except (ValueError, TypeError, FloatingPointError) as error: self', 'except KeyError as error: self', "widgets::test_an_error_is_shown_and_the_picture_stays"),
    ('(2 * steps - 1 if kind == "Heun" else steps)', 'steps', "widgets::test_explorer_sides"),
    ('"text/html": f\'<img', '"text/plain": f\'<img', "widgets::test_a_panel_is_also_a_picture"),
    ('return _png(torch.cat([xt, x0]), len(xt))', 'return _png(torch.cat([x0, xt]), len(xt))', "widgets::test_slider_shows_every_step"),
],
}
FAULTS = [Fault(module, *row) for module, rows in TABLE.items() for row in rows]
PLANTED = FAULTS if EVERY else [Fault(module, *rows[0]) for module, rows in TABLE.items()]


def module_of(fault): return importlib.import_module(f"diffusion_course.{fault.module}")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.module}: {f.right[:40]}")
def test_there_is_a_place_for_each(fault):
    "A fault that is nowhere would be caught for the wrong reason."
    assert planted.source(module_of(fault)).count(fault.right) == 1 and fault.right != fault.wrong


@pytest.fixture(scope="module")
def ready():
    "The test modules are imported here, once, and not in each process that forks off."
    for file in {fault.test.partition("::")[0] for fault in PLANTED}: importlib.import_module(f"test_{file}")


PLANT = """
import importlib, sys, planted, pytest
module, right, wrong, test = sys.argv[1:]
planted.plant(importlib.import_module(f"diffusion_course.{module}"), right, wrong)
sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--timeout", "300", test]))
"""

@pytest.mark.parametrize("fault", PLANTED, ids=lambda f: f"{f.module}: {f.right[:40]}")
def test_a_planted_fault_is_caught(ready, fault):
    file, _, test = fault.test.partition("::")
    done = forked(PLANT, fault.module, fault.right, fault.wrong, f"{ROOT}/tests/test_{file}.py::{test}")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, f"{fault.test} does not notice\n{done.stdout.decode()}{done.stderr.decode()}"
